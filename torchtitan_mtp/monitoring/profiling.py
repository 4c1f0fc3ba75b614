"""Profiler traces and CUDA memory snapshots every `profile_freq` steps, as [profiling] asks.

`with profile_steps(...) as profiler, snapshot_memory(...) as memory:` around the training loop,
`profiler.step()` and `memory.step()` at the end of every step.
"""

import functools
import logging
import os
import pickle
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.monitoring.observer import Observer
from torchtitan_mtp.writing import written_whole

logger = logging.getLogger(__name__)

SNAPSHOT_MAX_ENTRIES = 100_000  # allocations and frees that one snapshot remembers
_OFF = SimpleNamespace(step=lambda: None)  # where nothing is asked for


@contextmanager
def profile_steps(
    config: JobConfig, *, device: torch.device, rank: int = 0, start_step: int = 0
) -> Iterator[Any]:
    """Write `{save_traces_folder}/iteration_{step}/rank{R}_trace.json` (Chrome's format).

    In dump_folder. Of every `profile_freq` steps the last `profiler_active` are recorded, after
    `profiler_warmup` steps that are run and dropped.
    """
    profiling = config.profiling
    if not profiling.enable_profiling:
        yield _OFF
        return
    warmup, active = profiling.profiler_warmup, profiling.profiler_active
    wait = profiling.profile_freq - warmup - active
    folder = os.path.join(config.job.dump_folder, profiling.save_traces_folder)

    def write_trace(profiler: torch.profiler.profile) -> None:
        path = _dump_path(folder, f"iteration_{profiler.step_num}", f"rank{rank}_trace.json")
        begin = time.monotonic()
        with written_whole(path) as whole:
            profiler.export_chrome_trace(str(whole))
            with whole.open("rb") as file:  # the profiler does not say what it can't write
                file.seek(-2, os.SEEK_END)
                if not file.read().rstrip().endswith(b"}"):
                    raise OSError(f"{path} is not whole: is the disk full?")
        logger.info("profiler trace in %.1f s: %s", time.monotonic() - begin, path)

    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=wait, warmup=warmup, active=active),
        on_trace_ready=functools.partial(Observer("profiler traces").attempt, write_trace),
        record_shapes=True,
    ) as profiler:
        profiler.step_num = start_step  # folders carry the run's step, also after a resume
        yield profiler


class _Snapshots:
    def __init__(self, folder: str, freq: int, rank: int, step: int) -> None:
        self.folder, self.freq, self.rank, self.step_num = folder, freq, rank, step

    def step(self) -> None:
        self.step_num += 1
        if self.step_num % self.freq == 0:
            self.write(f"iteration_{self.step_num}")

    def write(self, name: str) -> None:
        path = _dump_path(self.folder, name, f"rank{self.rank}_memory_snapshot.pickle")
        with written_whole(path) as whole, whole.open("wb") as file:
            pickle.dump(torch.cuda.memory._snapshot(), file)
        logger.info("CUDA memory snapshot (for pytorch.org/memory_viz): %s", path)


@contextmanager
def snapshot_memory(
    config: JobConfig, *, device: torch.device, rank: int = 0, start_step: int = 0
) -> Iterator[Any]:
    """Write `{save_memory_snapshot_folder}/iteration_{step}/rank{R}_memory_snapshot.pickle`.

    In dump_folder; also when CUDA runs out of memory (`iteration_{step}_exit`), and that error goes
    on its way.
    Without a CUDA device there are none, which is said.
    """
    profiling = config.profiling
    if profiling.enable_memory_snapshot and device.type != "cuda":
        logger.warning("no memory snapshots: they are of CUDA's memory, this run's is %s's", device)
    if not profiling.enable_memory_snapshot or device.type != "cuda":
        yield _OFF
        return
    folder = os.path.join(config.job.dump_folder, profiling.save_memory_snapshot_folder)
    torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_MAX_ENTRIES)
    snapshots = _Snapshots(folder, profiling.profile_freq, rank, start_step)
    observer = Observer("memory snapshots", lambda: snapshots)
    try:
        yield observer
    except torch.OutOfMemoryError:
        observer.write(f"iteration_{snapshots.step_num}_exit")
        raise
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def _dump_path(folder: str, name: str, file: str) -> str:
    os.makedirs(os.path.join(folder, name), exist_ok=True)
    return os.path.join(folder, name, file)
