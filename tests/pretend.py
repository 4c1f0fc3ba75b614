"""A GPU that is not there: what is on it has shapes and no numbers, and whatever makes the host
wait for it is noted. Autograd, FSDP2 and fused optimizers run on it.

For a process of its own (`run_ranks`): what is registered with torch here stays.
"""

from __future__ import annotations

import contextlib
import traceback
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
DEVICE = (NAME, 0)
# What needs numbers of its input, as a value or to know the size of what comes out.
READS = (
    *("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select"),
    *("repeat_interleave", "unique_dim", "_unique2", "bincount"),
)
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")


class Event:
    """Waiting for one is noted."""

    notes: list[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def synchronize(self) -> None:
        self.notes.append(f"waits for an event: {_place()}")

    def record(self, stream: Any = None) -> None:
        pass

    wait = record


class Stream:
    """Of one whose work is done as soon as it is asked for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def wait_event(self, event: Event) -> None:
        pass

    wait_stream = wait_event


class Waits(TorchDispatchMode):
    """Runs what is on the host for real and what is on the GPU without numbers (integers come to
    the host as ones, floats as zeros), and notes what the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []
        self._pinned: dict[int, Tensor] = {}  # by storage

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "prim":  # what device it is on
            return func(*args, **kwargs)
        if func.namespace == "aten":
            with self:  # inference mode leaves whole what autograd would take apart
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        name = func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on_host = [t for t in tensors if t.device.type == "cpu"]
        on_gpu = [t for t in tensors if t.device.type == NAME]
        to = kwargs.get("device")
        if name in ("is_pinned", "_pin_memory"):
            return self._pin(name, args[0])
        if name == "copy_" and on_gpu and on_host:
            return self._copy(args[1], args[0].device, args[0].dtype, args[2:], kwargs, args[0])
        if (
            name == "_to_copy"
            and to is not None
            and {to.type, args[0].device.type} == {NAME, "cpu"}
        ):
            return self._copy(args[0], to, kwargs.get("dtype") or args[0].dtype, (), kwargs)
        if not on_gpu and (to is None or to.type == "cpu"):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        by_mask = name in INDEXED and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if on_gpu and (name in READS or by_mask):
            self._note(f"{name} reads {_shape(on_gpu[0])}")
            if name == "_local_scalar_dense":
                return 0.0 if on_gpu[0].is_floating_point() else 1
        if any(t.dim() for t in on_host):
            self._note(f"{name} of the GPU takes {_shape(on_host[0])} of the host")
        kwargs.pop("generator", None)
        return func(*args, **kwargs)

    def _pin(self, name: str, tensor: Tensor) -> Any:
        if name == "is_pinned":
            return tensor.untyped_storage()._cdata in self._pinned
        with unset_fake_temporarily():
            copy = tensor.clone()
        self._pinned[copy.untyped_storage()._cdata] = copy  # kept, for no other to have its number
        return copy

    def _copy(self, source, to, dtype, rest, kwargs, target=None):
        asynchronous = kwargs.get("non_blocking", bool(rest and rest[0]))
        if to.type == NAME:
            pinned = source.untyped_storage()._cdata in self._pinned
            if not (pinned and asynchronous):
                kind = "pinned" if pinned else "pageable"
                self._note(f"{_shape(source)} comes from {kind} memory, {asynchronous=}")
            return torch.empty(source.shape, dtype=dtype, device=to) if target is None else target
        if not asynchronous:
            self._note(f"{_shape(source)} goes to the host")
        with unset_fake_temporarily():
            value = 0 if dtype.is_floating_point else 1
            if target is None:
                return torch.full(source.shape, value, dtype=dtype)
            return target.fill_(value)

    def _note(self, what: str) -> None:
        self.notes.append(f"{what}: {_place()}")


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _place() -> str:
    """The package's last lines on the stack."""
    stack = (frame.filename.partition("/torchtitan_mtp/") for frame in traceback.extract_stack())
    lines = [frame.lineno for frame in traceback.extract_stack()]
    found = [f"{file}:{line}" for (_, _, file), line in zip(stack, lines, strict=True) if file]
    return " > ".join(found[-3:])


class PretendGPU:
    """`torch.device(*DEVICE)` is a GPU to this project's code, in `with gpu:`; `notes`: what the
    host waited for there."""

    def __init__(self) -> None:
        stream = Stream()
        module = SimpleNamespace(
            Event=Event,
            Stream=Stream,
            _is_in_bad_fork=lambda: False,
            current_device=lambda: 0,
            current_stream=lambda *device: stream,
            device_count=lambda: 1,
            get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
            is_available=lambda: True,
            is_initialized=lambda: True,
            manual_seed_all=lambda seed: None,
            set_device=lambda device: None,
            stream=contextlib.nullcontext,
        )
        _setup_privateuseone_for_python_backend(NAME, backend_module=module)
        Tensor.is_cuda = property(lambda tensor: tensor.device.type == NAME)
        FakeTensor.tolist = lambda tensor: tensor.cpu().tolist()  # one copy, as of a real one
        torch.cuda.current_stream = torch.accelerator.current_stream = module.current_stream
        generator = torch.Generator
        torch.Generator = lambda device="cpu": generator()
        self._fake, self._waits = FakeTensorMode(allow_non_fake_inputs=True), Waits()
        self.notes = Event.notes = self._waits.notes

    def __enter__(self) -> PretendGPU:
        # What is made of a list is made on the host and copied, as it is for a real GPU.
        torch._C._set_only_lift_cpu_tensors(True)
        self._fake.__enter__()
        self._waits.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._waits.__exit__(*error)
        self._fake.__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)

    def waited(self, act: Any) -> list[str]:
        """What the host waits for in `act()`."""
        self.notes.clear()
        with self:
            act()
        return list(self.notes)
