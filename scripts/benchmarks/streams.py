"""A clock for every stream of a fake GPU: what computation waits for.

An operation takes, on the stream that is current, the time of its arithmetic or of its bytes; a
stream that waits for an event goes on when that has happened. Collectives of one process group
follow one another in the order of their calls, whatever their streams, as NCCL's do. The CPU takes
no time: it is far ahead of the GPU. Nothing slows anything else down.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.fake_gpu import NAME

_COLLECTIVES = {  # how often the bytes go around
    "_allgather_base_": ("gather", 1),
    "_reduce_scatter_base_": ("reduce", 1),
    "allreduce_": ("all-reduce", 2),
}
_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")


@dataclass(frozen=True)
class Rates:
    """What the hardware does in a second."""

    link: float  # bytes, a GPU to all others and back: NCCL's bus bandwidth
    products: float = 700e12  # FLOPs of matrix products
    attention: float = 400e12
    memory: float = 2.9e12  # bytes
    fused: float = 0.4  # the share of elementwise operations' bytes that compilation leaves
    latency: float = 15e-6  # seconds of a collective


class Wait(NamedTuple):
    """Computation standing still."""

    collective: str  # for this
    busy: float  # seconds for which it ran before
    seconds: float


class Event:
    time, of = 0.0, ""

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or Stream.current
        # An asynchronous collective's end is an event of its own, which FSDP2 waits for together
        # with the one that it records right after the call.
        self.time, self.of = max(stream.time, stream.launched), stream.last
        stream.launched = 0.0


class Stream:
    current: Stream

    def __init__(self, priority: int = 0) -> None:
        self.time = self.launched = self.busy = 0.0
        self.last = ""
        self.waits: list[Wait] = []

    def wait_event(self, event: Event) -> None:
        if event.time > self.time:
            self.waits.append(Wait(event.of, self.busy, event.time - self.time))
            self.time = event.time

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event


class Clock(TorchDispatchMode):
    """Lets time go by on the current stream with every operation."""

    def __init__(self, rates: Rates) -> None:
        super().__init__()
        self.rates = rates
        self.compute = Stream()
        self.free: Counter[str] = Counter()  # when each process group is, in seconds
        self.bytes: Counter[str] = Counter()  # of whole tensors gathered and reduced

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its shard comes by
        out = func(*args, **(kwargs or {}))
        name, stream = func.overloadpacket.__name__, Stream.current
        given = _tensors((args, kwargs))
        made = [t for t in _tensors(out) if not any(t is other for other in given)]
        if not any(t.device.type == NAME for t in (*given, *made)):
            return out
        if func.namespace == "c10d":
            options = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
            self._communicate(name, options, max(t.nbytes for t in given))
        elif not func.is_view:
            seconds = self._seconds(func, name, args, given, made)
            stream.time += seconds
            stream.busy += seconds
        return out

    def _communicate(self, name: str, options: dict[str, Any], size: int) -> None:
        stream, group = Stream.current, dist.ProcessGroup.unbox(options["process_group"])
        what, rounds = _COLLECTIVES[name]
        ranks = group.size()
        end = stream.time
        if ranks > 1:
            self.bytes[what] += size
            end = max(end, self.free[group.group_name]) + self.rates.latency
            end += rounds * size * (ranks - 1) / ranks / self.rates.link
            self.free[group.group_name] = end
        stream.last = what
        if options.get("async_op", True):
            stream.launched = end
        else:
            stream.time = end

    def _seconds(self, func: Any, name: str, args: Any, given: Any, made: Any) -> float:
        rates = self.rates
        if "attention" in name:  # causal: half of the products
            batch, heads, length, width = args["backward" in name].shape
            flops = 2 * batch * heads * length**2 * width
            return flops * (2.5 if "backward" in name else 1) / rates.attention
        if name in _PRODUCTS:
            a, b = [t for t in args if isinstance(t, Tensor)][-2:]
            return 2 * a.numel() * b.shape[-1] / rates.products
        if name.startswith(("empty", "new_empty", "_unsafe_view", "set_", "resize_")):
            return 0.0
        if name == "all_gather_copy_in":  # of this rank's shard, into its place
            return 2 * sum(t.nbytes for t in args[0]) / rates.memory
        copies = func.namespace == "fsdp" or name.startswith("_foreach")
        size = sum(t.nbytes for t in (*given, *made))
        return size / rates.memory * (1 if copies else rates.fused)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def _stream(stream: Stream | None) -> Iterator[None]:
    before, Stream.current = Stream.current, stream or Stream.current
    try:
        yield
    finally:
        Stream.current = before


@contextlib.contextmanager
def clock(rates: Rates) -> Iterator[Clock]:
    """The streams of the fake GPU (inside `fake_gpu`) keep time."""
    found = Clock(rates)
    Stream.current = found.compute

    def current(*_: Any) -> Stream:
        return Stream.current

    streams = {"Stream": Stream, "Event": Event, "current_stream": current, "stream": _stream}
    with (
        mock.patch.multiple(getattr(torch, NAME), **streams),
        mock.patch.object(torch.accelerator, "current_stream", current),
        found,
    ):
        yield found
