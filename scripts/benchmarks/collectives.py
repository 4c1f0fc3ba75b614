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


def dimensions(world: World) -> dict[str, str]:
    """The names of process groups, and the dimension that each is of. Over several dimensions at
    once are counts and sums of losses: "batch", "losses", "all"."""
    names = {dist.group.WORLD.group_name: "all"}  # type: ignore[union-attr]
    for name, group in (("batch", world.batch), ("losses", world.losses)):
        if group is not None:
            names[group.group_name] = name
    if world.context_parallel is not None:
        names[world.context_parallel.name] = "cp"
    for name in world.mesh.mesh_dim_names or ():
        names[world.mesh[name].get_group().group_name] = name
    return names


class Collectives(TorchDispatchMode):
    """Counts calls and bytes by (dimension, kind)."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.names = dimensions(world)
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
            key = self.names[call.group.group_name], call.kind
            self.calls[key] += 1
            self.bytes[key] += call.bytes
