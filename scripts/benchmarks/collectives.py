"""Collectives as they are called: how many, of how many bytes, over which dimension of the mesh."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan_mtp.distributed.mesh import World

# The words in names of torch's operations, without underscores; the first that is there counts.
_KINDS = {
    "reducescatter": "reduce-scatter",
    "allgather": "all-gather",
    "allreduce": "all-reduce",
    "alltoall": "all-to-all",
    "broadcast": "broadcast",
    "send": "send",
    "recv": "receive",
    "batchp2p": "send",
}
_NAMESPACES = ("c10d", "_c10d_functional", "_dtensor")


class Call(NamedTuple):
    """One call on this rank. bytes: the larger of what it takes and what it gives."""

    kind: str
    bytes: int
    group: dist.ProcessGroup


def collective(func: Any, args: Any, kwargs: Any, out: Any) -> Call | None:
    """The collective that an operation is; None: it is none, or one of a single rank."""
    if func.namespace not in _NAMESPACES:
        return None
    name = func.overloadpacket.__name__.replace("_", "")
    kind = next((kind for word, kind in _KINDS.items() if word in name), None)
    if kind is None:
        return None
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
    group = given.get("process_group", given.get("group_name"))
    if isinstance(group, str):
        group = dist.distributed_c10d._resolve_process_group(group)
    elif not isinstance(group, dist.ProcessGroup):
        group = dist.ProcessGroup.unbox(group)
    if group.size() == 1:
        return None
    into, of = (sum(t.nbytes for t in _tensors(tree)) for tree in (out, (args, kwargs)))
    if func.namespace == "c10d":  # outputs are among the arguments
        of = max(t.nbytes for t in _tensors((args, kwargs)))
        into = 0
    return Call(kind, max(into, of), group)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


class Dimensions:
    """The dimension of the mesh that a process group is of.

    Of the flattened ones, "fsdp" and those that they are made of have their names; groups over
    several dimensions have all names, or "all". "ep" and "efsdp" are those of the experts' mesh.
    """

    def __init__(self, world: World) -> None:
        self.degrees = world.degrees
        self.names: dict[str, str] = {}
        shared = world.expert_parallel
        self.exchanges = None if shared is None else shared.name
        for mesh in (world.experts, world.mesh):
            for name in () if mesh is None else mesh.mesh_dim_names or ():
                self.names[mesh[name].get_group().group_name] = name

    def of(self, call: Call) -> str:
        group, name = call.group, call.group.group_name
        if name == self.exchanges and call.kind == "all-to-all":
            return "ep"  # its ranks may be those of "fsdp" too
        if name not in self.names:
            self.names[name] = self._spanned(dist.get_process_group_ranks(group))
        return self.names[name]

    def _spanned(self, ranks: list[int]) -> str:
        """The dimensions in which these ranks differ, from their places in the mesh."""
        if len(ranks) == self.degrees.ranks:
            return "all"
        inner, found = 1, []
        for name in ("tp", "cp", "dp_shard", "dp_replicate", "pp"):
            degree = getattr(self.degrees, name)
            if len({rank // inner % degree for rank in ranks}) > 1:
                found.append(name)
            inner *= degree
        return "+".join(reversed(found))


class Collectives(TorchDispatchMode):
    """Counts calls and bytes by (dimension, kind)."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.dimensions = Dimensions(world)
        self.calls: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its shard comes by
        out = func(*args, **(kwargs or {}))
        self.see(collective(func, args, kwargs, out))
        return out

    def see(self, call: Call | None) -> None:
        if call is not None:
            key = self.dimensions.of(call), call.kind
            self.calls[key] += 1
            self.bytes[key] += call.bytes
