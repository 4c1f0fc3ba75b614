"""A GPU that is not there, as one of any number: what a program has alive on it at its worst.

Tensors have shapes and no numbers (torch's FakeTensorMode), the other ranks are torch's fake
process group, whose collectives move nothing. To the program the device is a GPU, and it goes a
GPU's ways: attention by a kernel that keeps no scores, the loss in a GPU's chunks, products of
bfloat16. Or it is a CPU, with a CPU's ways: then what is counted can be held against a real run.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from torchtitan_mtp.data import targets
from torchtitan_mtp.distributed import tensor_parallel
from torchtitan_mtp.distributed.mesh import Degrees, World, world_of
from torchtitan_mtp.models import attention, latent_attention, transformer
from torchtitan_mtp.models.expert_parallel import ExpertParallel
from torchtitan_mtp.models.trunk import Trunk
from torchtitan_mtp.ops import chunked

NAME = "gpu"
ACTIVATIONS, COMMUNICATION = "activations", "communication"
# What a GPU has a kernel for, and other devices compute in several steps with their own memory.
_KERNELS = ("silu_backward", "_fused_rms_norm", "_fused_rms_norm_backward")


@dataclass(eq=False)
class Allocation:
    """One storage, of one size: resized, it is another. Times are counts of allocations and
    frees."""

    size: int  # bytes
    born: int
    died: float = float("inf")
    kind: str = ACTIVATIONS


class Allocations(TorchDispatchMode):
    """Every storage on the fake device, from the operation that makes it to the end of its last
    tensor. Not in it: what a real allocator rounds up and cannot reuse, and kernels' own room.

    kind: what those are that are made now; those that collectives, and FSDP2's copies for them,
    read or write become `COMMUNICATION`. alive, peak: bytes now, and most of them since `begin`;
    time, peak_at: now, and when that was.
    """

    def __init__(self, device: str = NAME) -> None:
        super().__init__()
        self.device, self.kind = device, ACTIVATIONS
        self.storages: dict[int, Allocation] = {}  # those alive
        self.seen: list[Allocation] = []  # those alive at some time since `begin`
        self.alive = self.time = 0
        self.counting = True
        self.begin()

    def begin(self) -> None:
        """Take the peak from here on."""
        self.peak, self.peak_at = self.alive, self.time
        self.seen = list(self.storages.values())

    def of(self, tensors: Iterable[Tensor]) -> set[Allocation]:
        """Those that these tensors are in; of sharded ones, the shards."""
        local = (t._local_tensor if isinstance(t, DTensor) else t for t in tensors)
        found = (self.storages.get(t.untyped_storage()._cdata) for t in local)
        return {allocation for allocation in found if allocation is not None}

    def mark(self, kind: str, allocations: Iterable[Allocation]) -> None:
        """Say what these are."""
        for allocation in allocations:
            allocation.kind = kind

    def kinds_at_peak(self) -> Callable[[], Counter[str]]:
        """Bytes alive at the present peak by kind, as these are known when it is asked for."""
        seen, peak_at = self.seen, self.peak_at

        def bytes_by_kind() -> Counter[str]:
            found: Counter[str] = Counter()
            for allocation in seen:
                if allocation.born <= peak_at < allocation.died:
                    found[allocation.kind] += allocation.size
            return found

        return bytes_by_kind

    @contextlib.contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """What is made now is of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is made now has no memory on a real device either."""
        self.counting = False
        yield
        self.counting = True

    def resize(self, key: int, size: int) -> None:
        """The storage `key` has so many bytes now."""
        before = self.storages[key]
        self._end(before)
        self._start(key, size, before.kind)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # the operation on its shard comes by
        out = func(*args, **(kwargs or {}))
        if not self.counting:
            return out
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device:
                self._see(tensor.untyped_storage())
        if func.namespace in ("fsdp", "c10d", "_c10d_functional"):
            tensors = pytree.tree_leaves((args, kwargs, out))
            touched = self.of(t for t in tensors if isinstance(t, Tensor))
            self.mark(COMMUNICATION, (a for a in touched if a.kind == ACTIVATIONS))
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.storages:
            self._start(key, storage.nbytes(), self.kind)
            weakref.finalize(storage, self._free, key)

    def _start(self, key: int, size: int, kind: str) -> None:
        self.time += 1
        self.storages[key] = made = Allocation(size, self.time, kind=kind)
        self.seen.append(made)
        self.alive += size
        if self.alive > self.peak:
            self.peak, self.peak_at = self.alive, self.time

    def _end(self, allocation: Allocation) -> None:
        self.time += 1
        allocation.died = self.time
        self.alive -= allocation.size

    def _free(self, key: int) -> None:
        self._end(self.storages.pop(key))


class _Stream(torch.cpu.Stream):
    def record_event(self, event: Any = None) -> Any:
        return event or torch.cpu.Event()


class _Arrived:
    """A stream on which nothing has to be waited for."""

    def record_event(self) -> None:
        pass


class _Module(backend_registration._DummyBackendModule):
    """`torch.gpu`; its streams order nothing."""

    Stream, Event, stream = _Stream, torch.cpu.Event, staticmethod(torch.cpu.stream)

    def current_stream(self, device: Any = None) -> _Stream:
        return _Stream()

    def set_device(self, device: Any) -> None:
        pass

    def get_rng_state(self, device: Any = None) -> None:
        """Nothing is random."""

    def set_rng_state(self, state: None, device: Any = None) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float | None = None) -> Tensor:
    """`attention.attend` by the kernel that fits on a GPU. A mask is a block mask there, and takes
    nothing to speak of."""
    if q.shape[-1] == v.shape[-1]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(q, k, v, 0.0, True, scale=scale)[0]
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(q, k, v, None, True, 0.0, True, scale=scale)[0]


def _one_document(doc_ids: Tensor) -> targets.Documents:
    rows, longest = doc_ids.shape
    return targets.Documents(doc_ids.new_empty(rows + 1, dtype=torch.int32), longest)


class _Chunks:
    """What `torch.chunk` gives, each when it is asked for: FSDP2 makes one for every rank and
    takes its own."""

    def __init__(self, tensor: Tensor, count: int, dim: int) -> None:
        self.tensor, self.count, self.dim = tensor, count, dim

    def __getitem__(self, i: int) -> Tensor:
        length = self.tensor.shape[self.dim]
        size = -(-length // self.count)
        start = i * size
        if start >= length:
            return self.tensor.new_empty(0)
        return self.tensor.narrow(self.dim, start, min(size, length - start))


def _all_rows(labels: Tensor, _: int, chunk: int) -> Iterator[slice]:
    """Every label is a target."""
    for start in range(0, len(labels), chunk):
        yield slice(start, min(start + chunk, len(labels)))


class _EvenRouting:
    """Experts that ranks share get as many rows from each rank."""

    def __init__(self) -> None:
        self.rows, self.run = 0, ExpertParallel.run

    def run_noting(self, ranks: ExpertParallel, experts: Any, rows: Tensor, *others: Any) -> Tensor:
        self.rows = len(rows)
        return self.run(ranks, experts, rows, *others)

    def sizes(self, asked: Tensor) -> list[list[int]]:
        """What the host reads of a tensor [2, ranks]: rows that are sent, and that are taken."""
        ranks = asked.shape[1]
        each, rest = divmod(self.rows, ranks)
        return [[each + (i < rest) for i in range(ranks)] for _ in range(2)]


def _bare_copy(module: nn.Module) -> nn.Module:
    """What tensor parallelism copies has no memory: it is on the meta device then, but not here."""
    bare = copy.deepcopy(module, {id(p): p for p in module.parameters()})
    for part in bare.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad))
    return bare


def _without_modes(function: Callable[..., Any]) -> Callable[..., Any]:
    """A mesh has the numbers of its ranks in real tensors."""

    @functools.wraps(function)
    def really(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return really


def _patches(allocations: Allocations) -> Iterator[Any]:
    """What a fake tensor, or a fake rank of thousands, can't do as a real one does."""
    resize, propagate = (
        torch.UntypedStorage.resize_,
        ShardingPropagator._propagate_tensor_meta_non_cached,
    )

    def resized(storage: torch.UntypedStorage, size: int) -> Any:
        resize(storage, size)
        if storage._cdata in allocations.storages:
            allocations.resize(storage._cdata, size)

    def propagated(*args: Any) -> Any:
        with allocations.paused():
            return propagate(*args)

    patch = mock.patch.object
    for name in ("__init__", "__getitem__", "_flatten", "_unflatten"):
        yield patch(DeviceMesh, name, _without_modes(getattr(DeviceMesh, name)))
    yield patch(DeviceMesh, "mesh", property(_without_modes(DeviceMesh.mesh.fget)))
    yield patch(torch.UntypedStorage, "resize_", resized)  # FSDP2 frees and allocates by it
    yield patch(ShardingPropagator, "_propagate_tensor_meta_non_cached", propagated)
    yield patch(_fsdp_param, "_chunk_with_empty", _Chunks)
    yield patch(chunked, "_row_chunks", _all_rows)
    # What is read on the host are ones: every head has a target, and all is finite.
    yield patch(FakeTensor, "numpy", lambda tensor: np.ones(tuple(tensor.shape)), create=True)
    yield patch(tensor_parallel, "copy", SimpleNamespace(deepcopy=_bare_copy))
    routing = _EvenRouting()
    run = lambda ranks, *args: routing.run_noting(ranks, *args)  # noqa: E731
    yield patch(ExpertParallel, "run", run)
    yield patch(FakeTensor, "tolist", lambda tensor: routing.sizes(tensor), create=True)
    if allocations.device != NAME:
        return
    is_cuda = property(lambda tensor: tensor.device.type == NAME)
    yield patch(torch.accelerator, "current_stream", lambda *_: _Stream())
    yield patch(torch.cuda, "current_stream", lambda *_: _Arrived())
    yield patch(FakeTensorMode, "avoid_device_init", True)  # torch.tensor asks no device then
    yield patch(FakeTensor, "is_cuda", is_cuda, create=True)
    yield patch(attention, "attend", _attend)
    yield patch(latent_attention, "attend", _attend)
    yield patch(transformer, "packed_mask", lambda *_: None)
    yield patch(targets, "list_documents", _one_document)
    yield patch(FakeTensor, "pin_memory", lambda tensor: tensor, create=True)


@functools.cache
def _add_device() -> torch.library.Library:
    """Teach this process of the device, once; what is returned keeps its kernels registered."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library = torch.library.Library("aten", "IMPL")
    for name in _KERNELS:
        library.impl(name, _unexpected, "PrivateUse1")
    make = dist.Backend._plugins["FAKE"].creator_fn
    dist.Backend.register_backend("faked", make, extended_api=True, devices=["cpu", NAME])
    return library


@contextlib.contextmanager
def fake_rank(
    degrees: Degrees, device: str = NAME, rank: int = 0
) -> Iterator[tuple[World, Allocations]]:
    """A rank of a mesh of so many, and what is allocated there, on a "gpu" or "cpu". The process
    knows the device from then on, so it should be one of its own."""
    _add_device()
    dist.init_process_group("faked", rank=rank, world_size=degrees.ranks, store=FakeStore())
    world = world_of(torch.device(NAME, 0) if device == NAME else torch.device(device), degrees)
    allocations = Allocations(device)
    with contextlib.ExitStack() as stack:
        for patch in _patches(allocations):
            stack.enter_context(patch)
        stack.enter_context(FakeTensorMode())
        stack.enter_context(allocations)
        yield world, allocations
    dist.destroy_process_group()


fake_gpu: Callable[..., Any] = functools.partial(fake_rank, device=NAME)


def _unexpected(*_: Any) -> None:
    raise AssertionError("a fake GPU computes nothing")


def put_on(model: Trunk, device: torch.device) -> None:
    """Move a model from the meta device onto the fake GPU; nobody asks for its weights there."""
    for module in model.modules():
        for name, t in module.named_parameters(recurse=False):
            empty = torch.empty(t.shape, dtype=t.dtype, device=device)
            module.register_parameter(name, nn.Parameter(empty, t.requires_grad))
        for name, t in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(t.shape, dtype=t.dtype, device=device)
    model.tie_weights()
    # What is called to this end later, of any model:
    model.to_empty = lambda device: model  # type: ignore[method-assign, assignment, misc]
    model.init_weights = lambda seed: model.init_buffers()  # type: ignore[method-assign]
