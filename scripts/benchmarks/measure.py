"""Time and peak memory of one case, measured in a process of its own."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from torchtitan_mtp.errors import UserError


@dataclass
class Measurement:
    """Best of the repeats; memory is the peak above what the inputs take."""

    cpu_s: float  # CPU-seconds of all threads (on CUDA: of the host)
    wall_s: float
    peak_mib: float

    @property
    def seconds(self) -> float:
        """Wall-clock on CUDA; else CPU-seconds, to which other processes add little."""
        return self.wall_s if torch.cuda.is_available() else self.cpu_s


def fastest(a: Measurement, b: Measurement) -> Measurement:
    """The smaller of each figure: other load only ever adds."""
    return Measurement(min(a.cpu_s, b.cpu_s), min(a.wall_s, b.wall_s), min(a.peak_mib, b.peak_mib))


def measure(
    prepare: Callable[..., Callable[[], None]],
    repeats: int,
    threads: int | None = None,
    **kwargs: Any,
) -> Measurement:
    """Measure ``prepare(**kwargs)()`` in a fresh process.

    Args:
        prepare: a module-level function that builds the inputs, warms up and returns one step.
        repeats: timed calls; the smallest time counts, since other load only ever adds. Memory
            is that of the first.
        threads: of torch; None: as many as torch chooses.
        kwargs: what `prepare` takes; picklable.

    Raises:
        RuntimeError: the case failed; the message is its own.
    """
    return in_process(measure_here, prepare, repeats, threads, kwargs)


def in_process(function: Callable[..., Any], *args: Any, limit: float | None = None) -> Any:
    """``function(*args)`` in a fresh process; an exception comes back as itself.

    It is the fork of a server that has imported libraries and has done nothing else.

    Raises:
        TimeoutError: it took longer than `limit` seconds, and was ended.
        RuntimeError: it died without an answer.
    """
    # A library that asks the driver for GPUs as it is imported would leave the forks without them.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchtitan_mtp.trainer", "torchao.float8", "matplotlib"])
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(theirs, function, args))
    child.start()
    theirs.close()
    try:
        if not ours.poll(limit):
            raise TimeoutError(f"ended after its limit of {limit:.0f} s")
        error, found = ours.recv()
        child.join(5)
    except EOFError:
        child.join()
        raise RuntimeError(f"its process died, exit code {child.exitcode}") from None
    finally:
        child.kill()
        child.join()
    if error is not None:
        raise error
    return found


def _answer(pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Sends (exception, result), one of them None."""
    try:
        answer = None, function(*args)
    except Exception as error:
        if not isinstance(error, UserError):
            traceback.print_exc()
        answer = error, None
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # some exceptions of compilers
            answer = RuntimeError(f"{type(error).__name__}: {error}"), None
    pipe.send(answer)


def measure_here(
    prepare: Callable[..., Callable[[], None]],
    repeats: int,
    threads: int | None,
    kwargs: dict[str, Any],
) -> Measurement:
    """As `measure`, in this process."""
    if threads is not None:
        torch.set_num_threads(threads)
    _return_freed_memory(True)
    step = prepare(**kwargs)
    cpu, wall = [], []

    def timed_step() -> None:
        synchronize()
        cpu_start, wall_start = time.process_time(), time.perf_counter()
        step()
        synchronize()
        cpu.append(time.process_time() - cpu_start)
        wall.append(time.perf_counter() - wall_start)

    peak = _peak_mib(timed_step)
    _return_freed_memory(False)
    for _ in range(repeats - 1):
        timed_step()
    return Measurement(min(cpu), min(wall), peak)


def _return_freed_memory(at_once: bool) -> None:
    """Whether freed tensors go back to the system at once: exact for memory, slow for time.

    glibc otherwise keeps blocks under 32 MiB, and what an earlier step has freed would count as in
    use before this one.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_threshold, 2**16 if at_once else 2**25)
    libc.mallopt(m_trim_threshold, 2**16 if at_once else 2**30)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_mib(step: Callable[[], None]) -> float:
    """Peak memory of one step above what is in use before it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        step()
        synchronize()
        return (torch.cuda.max_memory_allocated() - allocated) / 2**20
    # Linux: writing 5 sets the high-water mark of the resident memory back to its present size.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kib("VmRSS")
    step()
    return (_status_kib("VmHWM") - before) / 2**10


def _status_kib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return float(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}; memory is measured on Linux or CUDA only")


def matmul_flops_per_second(
    dtype: torch.dtype, size: int | None = None, repeats: int = 5, threads: int | None = None
) -> float:
    """Fastest measured square matmul: FLOPs per CPU-second (per second on CUDA, where 2048 is too
    small to fill a device)."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clock = time.perf_counter if device == "cuda" else time.process_time
    size = size or (8192 if device == "cuda" else 2048)
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(repeats):
        synchronize()
        start = clock()
        a @ a
        synchronize()
        best = min(best, clock() - start)
    torch.set_num_threads(before)
    return 2 * size**3 / best


def row_of(measurement: Measurement) -> dict[str, float]:
    return asdict(measurement)
