"""A clock for every stream of a fake GPU: what computation waits for.

An operation takes, on the stream that is current, the time of its arithmetic or of its bytes; a
stream that waits for an event, or for a functional collective's result, goes on when that has
happened. Collectives of one process group follow one another in the order of their calls, whatever
their streams, as NCCL's do. The CPU takes no time: it is far ahead of the GPU. Nothing slows
anything else down.
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
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.collectives import Call, Collectives, collective
from benchmarks.fake_gpu import NAME
from torchtitan_mtp.distributed.mesh import World

_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "_scaled_mm")


@dataclass(frozen=True)
class Rates:
    """What the hardware does in a second."""

    link: float  # bytes, a GPU to all others and back: NCCL's bus bandwidth
    between: float | None = None  # the same over several machines; None: as within one
    machine: int = 8  # GPUs of one
    products: float = 700e12  # FLOPs of matrix products
    attention: float = 400e12
    memory: float = 2.9e12  # bytes
    fused: float = 0.4  # the share of elementwise operations' bytes that compilation leaves
    latency: float = 15e-6  # seconds of a collective


class Wait(NamedTuple):
    """Computation standing still."""

    collective: tuple[str, str]  # for this: its dimension and kind
    busy: float  # seconds for which it ran before
    seconds: float


class Event:
    time, of = 0.0, ("", "")

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
        self.last = ("", "")
        self.waits: list[Wait] = []

    def wait_event(self, event: Event) -> None:
        self.wait_until(event.time, event.of)

    def wait_until(self, time: float, of: tuple[str, str]) -> None:
        if time > self.time:
            self.waits.append(Wait(of, self.busy, time - self.time))
            self.time = time

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event


class Clock(TorchDispatchMode):
    """Lets time go by on the current stream with every operation."""

    def __init__(self, world: World, rates: Rates) -> None:
        super().__init__()
        self.rates, self.collectives = rates, Collectives(world)
        self.compute = Stream()
        self.free: Counter[str] = Counter()  # when each process group is, in seconds
        self.links: dict[str, float] = {}  # of each process group
        self.arrival: dict[int, tuple[float, tuple[str, str]]] = {}  # of functional collectives
        self.flops = 0  # of products, attention's among them

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its shard comes by
        out = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # a question, as for a tensor's device
            return out
        name, stream = func.overloadpacket.__name__, Stream.current
        given = _tensors((args, kwargs))
        made = [t for t in _tensors(out) if not any(t is other for other in given)]
        if not any(t.device.type == NAME for t in (*given, *made)):
            return out
        if name == "wait_tensor":
            self._wait(given[0])
        elif func.namespace in ("c10d", "_c10d_functional"):
            options = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
            call = collective(func, args, kwargs, out)
            self.collectives.see(call)
            end, what = self._communicate(call)
            if func.namespace == "_c10d_functional":
                for tensor in made or given:
                    self.arrival[tensor.untyped_storage()._cdata] = end, what
            elif call is not None and call.kind == "receive":
                stream.wait_until(end, what)  # torch's schedules wait right after the call
            elif call is not None and call.kind == "send":
                pass  # and for these later, when they are over
            elif options.get("async_op", True):
                stream.last, stream.launched = what, end
            else:
                stream.last, stream.time = what, end
        elif not func.is_view:
            seconds = self._seconds(func, name, args, given, made)
            stream.time += seconds
            stream.busy += seconds
        return out

    def _communicate(self, call: Call | None) -> tuple[float, tuple[str, str]]:
        """When a collective that is called now has ended, and which it is."""
        now = Stream.current.time
        if call is None:
            return now, ("", "")
        group, ranks = call.group.group_name, call.group.size()
        share = (ranks - 1) / ranks * (2 if call.kind == "all-reduce" else 1)
        if call.kind in ("send", "receive"):  # both ways at once, and nothing stays here
            group, share = f"{group} {call.kind}", 1.0
        end = max(now, self.free[group]) + self.rates.latency
        end += share * call.bytes / self._link(call.group)
        self.free[group] = end
        return end, (self.collectives.dimensions.of(call), call.kind)

    def _link(self, group: dist.ProcessGroup) -> float:
        rates, name = self.rates, group.group_name
        if name not in self.links:
            machines = {rank // rates.machine for rank in dist.get_process_group_ranks(group)}
            apart = len(machines) > 1 and rates.between is not None
            self.links[name] = rates.between if apart else rates.link  # type: ignore[assignment]
        return self.links[name]

    def _wait(self, tensor: Tensor) -> None:
        """Computation goes on when a functional collective's result is there."""
        end, what = self.arrival.pop(tensor.untyped_storage()._cdata, (0.0, ("", "")))
        Stream.current.wait_until(end, what)

    def _seconds(self, func: Any, name: str, args: Any, given: Any, made: Any) -> float:
        rates = self.rates
        flops, rate = 0, rates.products
        if "attention" in name:  # causal: half of the products
            q, k, v = args["backward" in name :][:3]
            flops = q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
            flops, rate = int(flops * (2.5 if "backward" in name else 1)), rates.attention
        elif name in _PRODUCTS:
            a, b = args[name.startswith(("add", "badd")) :][:2]
            flops, rate = 2 * a.numel() * b.shape[-1], rate * (2 if a.dtype.itemsize == 1 else 1)
        elif name in (
            "grouped_linear",
            "grouped_outer",
        ):  # [R, in], [E, out, in]; [R, out], [R, in]
            flops = 2 * args[0].numel() * args[1].shape[1]
        if flops:
            self.flops += flops
            return flops / rate
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
def clock(world: World, rates: Rates) -> Iterator[Clock]:
    """The streams of the fake GPU (inside `fake_gpu`) keep time."""
    found = Clock(world, rates)
    Stream.current = found.compute

    def current(*_: Any) -> Stream:
        return Stream.current

    propagate = ShardingPropagator._propagate_tensor_meta_non_cached

    def propagated(*args: Any) -> Any:
        with _stream(Stream()):  # a question about shapes, once in a process: it takes no time
            return propagate(*args)

    streams = {"Stream": Stream, "Event": Event, "current_stream": current, "stream": _stream}
    with (
        mock.patch.multiple(getattr(torch, NAME), **streams),
        mock.patch.object(torch.accelerator, "current_stream", current),
        mock.patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", propagated),
        found,
    ):
        yield found
