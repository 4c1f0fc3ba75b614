"""`benchmark.py checkpoint`: what checksums cost, as shares of the time to save and to load."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter

from benchmarks.report import report
from torchtitan_mtp.checkpoint.load import open_checkpoint, read_states
from torchtitan_mtp.checkpoint.manifest import FULL, Manifest, write_manifest
from torchtitan_mtp.checkpoint.storage import SummingWriter
from torchtitan_mtp.distributed.ranks import Ranks

TENSOR = 8 << 20  # values in each; 32 MiB


def run(
    gigabytes: float = 1.0,
    repeats: int = 5,
    folder: Path | None = None,
    json: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Seconds to save and to load one rank's tensors, with and without checksums.

    Both ways take turns, and the smallest time of each counts. What is loaded is in the page cache,
    where a load is fastest and checksums weigh most, and then not in it, as after a restart.

    Args:
        gigabytes: of float32 tensors.
        repeats: times that each is measured.
        folder: on the disk to measure; default: the system's temporary folder.
        json: file for the figures.
        plot: PNG file for a bar chart.
    """
    logging.disable()
    warnings.filterwarnings("ignore", message=".*single process.*")
    place = Path(tempfile.mkdtemp(dir=folder))
    try:
        rows = table(place, gigabytes, repeats)
    finally:
        shutil.rmtree(place)
    report(rows, json, plot, bars=("without checksums (s)", "with (s)"))


def table(place: Path, gigabytes: float, repeats: int) -> list[dict[str, Any]]:
    """A row for saving and one for loading."""
    count = max(1, round(gigabytes * 1e9 / (4 * TENSOR)))
    states = {f"layers.{i}.weight": torch.randn(TENSOR) for i in range(count)}
    seconds: dict[str, list[float]] = {}

    def timed(name: str, action: Callable[[], object]) -> None:
        start, cpu = time.perf_counter(), time.process_time()
        action()
        seconds.setdefault(name, []).append(time.perf_counter() - start)
        seconds.setdefault(f"{name} cpu", []).append(time.process_time() - cpu)

    folder, writers = place / "step-1", {"plain": FileSystemWriter, "summed": SummingWriter}
    # Each goes first every other time: memory that was freed just before is had at less cost.
    turns = [sorted(writers, reverse=bool(i % 2)) for i in range(repeats)]
    for turn in turns:
        for name in turn:
            shutil.rmtree(folder, ignore_errors=True)
            timed(f"save {name}", partial(_save, writers[name](folder), states, folder))
    shutil.rmtree(folder)
    _save(SummingWriter(folder), states, folder)
    for name in itertools.chain(*turns):
        timed(f"load {name}", partial(_load, folder, states, name == "summed"))
    for name in itertools.chain(*turns):
        _forget(folder)
        timed(f"cold load {name}", partial(_load, folder, states, name == "summed"))
    best = {name: min(values) for name, values in seconds.items()}
    return [
        {
            "what": f"{what} {count * 4 * TENSOR / 1e9:.2f} GB",
            "without checksums (s)": best[f"{what} plain"],
            "with (s)": best[f"{what} summed"],
            "ratio": best[f"{what} summed"] / best[f"{what} plain"],
            "CPU-s without": best[f"{what} plain cpu"],
            "CPU-s with": best[f"{what} summed cpu"],
        }
        for what in ("save", "load", "cold load")
    ]


def _save(writer: FileSystemWriter, states: dict[str, Any], folder: Path) -> None:
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.save(states, storage_writer=writer, planner=planner, no_dist=True)
    if isinstance(writer, SummingWriter):
        write_manifest(folder, Manifest(1, FULL, 1, writer.entries))


def _forget(folder: Path) -> None:
    """Drop the files from the page cache."""
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _load(folder: Path, states: dict[str, Any], verify: bool) -> None:
    ranks = Ranks(alone=True)
    read_states(open_checkpoint(folder, ranks, verify), dict(states), ranks)
