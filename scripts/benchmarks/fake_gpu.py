"""A GPU that is not there, as one of any number: what a program has alive on it at its worst.

Tensors have shapes and no numbers (torch's FakeTensorMode), the other ranks are torch's fake
process group, whose collectives move nothing. To the program the device is a GPU, and it goes a
GPU's ways: attention by a kernel that keeps no scores, the loss in a GPU's chunks, products of
bfloat16.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan_mtp.data import targets
from torchtitan_mtp.distributed.mesh import Degrees, World, world_of
from torchtitan_mtp.models import attention, latent_attention, transformer
from torchtitan_mtp.models.trunk import Trunk

NAME = "gpu"
# What a GPU has a kernel for, and other devices compute in several steps with their own memory.
_KERNELS = ("silu_backward", "_fused_rms_norm", "_fused_rms_norm_backward")


@dataclass(eq=False)
class Allocation:
    """One storage. Times are counts of allocations and frees."""

    size: int  # bytes
    born: int
    died: float = float("inf")


class Allocations(TorchDispatchMode):
    """Every storage on the fake GPU, from the operation that makes it to the end of its last
    tensor. Not in it: what a real allocator rounds up and cannot reuse, and kernels' own room.

    alive, peak: bytes now, and most of them since `begin`; time, peak_at: now, and when that was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, Allocation] = {}  # those alive
        self.alive = self.time = 0
        self.counting = True
        self.begin()

    def begin(self) -> None:
        """Take the peak from here on."""
        self.peak, self.peak_at = self.alive, self.time

    def of(self, tensors: Iterable[Tensor]) -> set[Allocation]:
        """Those that these tensors are in; of sharded ones, the shards."""
        local = (t._local_tensor if isinstance(t, DTensor) else t for t in tensors)
        return {self.storages[t.untyped_storage()._cdata] for t in local}

    def at_peak(self, allocations: Iterable[Allocation]) -> int:
        """Bytes of those of them that were alive then."""
        return sum(a.size for a in allocations if a.born <= self.peak_at < a.died)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is made now has no memory on a real GPU either."""
        self.counting = False
        yield
        self.counting = True

    def resize(self, key: int, size: int) -> None:
        """The storage `key` has so many bytes now."""
        self.time += 1
        self.alive += size - self.storages[key].size
        self.storages[key].size = size
        if self.alive > self.peak:
            self.begin()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # the operation on its shard comes by
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out) if self.counting else ():
            if isinstance(tensor, Tensor) and tensor.device.type == NAME:
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.storages:
            self.storages[key] = Allocation(0, self.time + 1)
            self.resize(key, storage.nbytes())
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.time += 1
        freed = self.storages.pop(key)
        freed.died = self.time
        self.alive -= freed.size


class _Stream(torch.cpu.Stream):
    def record_event(self, event: Any = None) -> Any:
        return event or torch.cpu.Event()


class _Module(backend_registration._DummyBackendModule):
    """`torch.gpu`; its streams order nothing."""

    Stream, Event, stream = _Stream, torch.cpu.Event, staticmethod(torch.cpu.stream)

    def current_stream(self, device: Any = None) -> _Stream:
        return _Stream()

    def set_device(self, device: Any) -> None:
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


@contextlib.contextmanager
def _patched(allocations: Allocations) -> Iterator[None]:
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

    is_cuda = property(lambda tensor: tensor.device.type == NAME)
    patch = mock.patch.object
    with (
        patch(torch.UntypedStorage, "resize_", resized),  # FSDP2 frees and allocates by it
        patch(ShardingPropagator, "_propagate_tensor_meta_non_cached", propagated),
        patch(torch.accelerator, "current_stream", lambda *_: _Stream()),
        patch(FakeTensorMode, "avoid_device_init", True),  # torch.tensor asks no device then
        patch(FakeTensor, "is_cuda", is_cuda, create=True),
        patch(attention, "attend", _attend),
        patch(latent_attention, "attend", _attend),
        patch(transformer, "packed_mask", lambda *_: None),
        patch(targets, "list_documents", _one_document),
        patch(FakeTensor, "pin_memory", lambda tensor: tensor, create=True),
    ):
        yield


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
def fake_gpu(degrees: Degrees) -> Iterator[tuple[World, Allocations]]:
    """Rank 0 of a mesh of so many, and what is allocated there. The process knows the device from
    then on, so it should be one of its own."""
    _add_device()
    dist.init_process_group("faked", rank=0, world_size=degrees.ranks, store=FakeStore())
    world = world_of(torch.device(NAME, 0), degrees)
    allocations = Allocations()
    with _patched(allocations), FakeTensorMode(), allocations:
        yield world, allocations
    dist.destroy_process_group()


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
