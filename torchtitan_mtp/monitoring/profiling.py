"""Profiler traces and CUDA memory snapshots every `profile_freq` steps, as [profiling] asks."""

from __future__ import annotations

import logging
import os
import pickle
import time
from functools import partial
from pathlib import Path

import torch

from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.monitoring.observer import Observer
from torchtitan_mtp.writing import written_whole

logger = logging.getLogger(__name__)

SNAPSHOT_MAX_ENTRIES = 100_000  # allocations and frees that one snapshot remembers


class Profiling:
    """Around the training loop, with `step()` at the end of every step. In dump_folder it writes

    `{save_traces_folder}/iteration_{step}/rank{R}_trace.json` (Chrome's format): of every
    `profile_freq` steps the last `profiler_active` are recorded, after `profiler_warmup` steps that
    are run and dropped;

    `{save_memory_snapshot_folder}/iteration_{step}/rank{R}_memory_snapshot.pickle`, also when CUDA
    runs out of memory (`iteration_{step}_exit`), and that error goes on its way. Without a CUDA
    device there are none, which is said.
    """

    def __init__(
        self, config: JobConfig, *, device: torch.device, rank: int = 0, start_step: int = 0
    ) -> None:
        self.asked, self.dump_folder = config.profiling, config.job.dump_folder
        self.rank, self.step_num = rank, start_step
        self.profiler = self._profiler(device) if self.asked.enable_profiling else None
        self.remembers = self.asked.enable_memory_snapshot and device.type == "cuda"
        self.snapshots = Observer("memory snapshots")
        if self.asked.enable_memory_snapshot and not self.remembers:
            logger.warning("no memory snapshots, which are of CUDA: this run is on %s", device)

    def _profiler(self, device: torch.device) -> torch.profiler.profile:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        warmup, active = self.asked.profiler_warmup, self.asked.profiler_active
        wait = self.asked.profile_freq - warmup - active
        profiler = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=wait, warmup=warmup, active=active),
            on_trace_ready=partial(Observer("profiler traces").attempt, self._write_trace),
            record_shapes=True,
        )
        profiler.step_num = self.step_num  # it records by the run's step, also after a resume
        return profiler

    def __enter__(self) -> Profiling:
        if self.profiler:
            self.profiler.start()
        if self.remembers:
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_MAX_ENTRIES)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.remembers:
            if isinstance(error, torch.OutOfMemoryError):
                self.snapshots.attempt(self._write_snapshot, "_exit")
            torch.cuda.memory._record_memory_history(enabled=None)
        if self.profiler:
            self.profiler.stop()

    def step(self) -> None:
        self.step_num += 1
        if self.profiler:
            self.profiler.step()
        if self.remembers and self.step_num % self.asked.profile_freq == 0:
            self.snapshots.attempt(self._write_snapshot)

    def _write_trace(self, profiler: torch.profiler.profile) -> None:
        path, begin = self._path(self.asked.save_traces_folder, "trace.json"), time.monotonic()
        with written_whole(path) as whole:
            profiler.export_chrome_trace(str(whole))
            with whole.open("rb") as file:  # the profiler does not say what it can't write
                file.seek(-2, os.SEEK_END)
                if not file.read().rstrip().endswith(b"}"):
                    raise OSError(f"{path} is not whole: is the disk full?")
        logger.info("profiler trace in %.1f s: %s", time.monotonic() - begin, path)

    def _write_snapshot(self, end: str = "") -> None:
        path = self._path(self.asked.save_memory_snapshot_folder, "memory_snapshot.pickle", end)
        with written_whole(path) as whole, whole.open("wb") as file:
            pickle.dump(torch.cuda.memory._snapshot(), file)
        logger.info("CUDA memory snapshot (for pytorch.org/memory_viz): %s", path)

    def _path(self, folder: str, name: str, end: str = "") -> Path:
        place = Path(self.dump_folder, folder, f"iteration_{self.step_num}{end}")
        place.mkdir(parents=True, exist_ok=True)
        return place / f"rank{self.rank}_{name}"
