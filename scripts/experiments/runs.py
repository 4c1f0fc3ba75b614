"""Running the runs of an experiment: each once, some at a time, and never again what is there."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import multiprocessing
import os
import platform
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from experiments.design import Row, Run, folder_name
from experiments.measures import Trained
from torchtitan_mtp import train
from torchtitan_mtp.checkpoint import find_checkpoint
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.inference import load_for_inference
from torchtitan_mtp.writing import written_whole

BASE = {
    "model.name": "llama3",
    "model.flavor": "custom",
    "model.converters": ["mtp"],
    "model.hf_assets_path": "byte",
    "training.mixed_precision_param": "float32",
    "optimizer.lr": 3e-3,
    "lr_scheduler.decay_type": "cosine",
    "lr_scheduler.min_lr_factor": 0.05,
    "activation_checkpoint.mode": "none",
    "checkpoint.enable": True,  # the last step's alone
    "checkpoint.interval": 1_000_000,
    "metrics.log_freq": 100,
}


def workers(jobs: int) -> ProcessPoolExecutor:
    """So many processes for runs, each on one core."""
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin)


def _begin() -> None:
    """One thread, and no life after the program's own end."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_it() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()


def run_all(runs: Sequence[Run], folder: Path, pool: ProcessPoolExecutor, jobs: int) -> list[Row]:
    """A row for each run, in their order: factors, seed and figures.

    A run whose `result.json` is of the same settings, texts and measures is not run again; one
    whose measures alone differ is measured again. Those that start from others come after these.

    Errors: a run fails or its process dies.
    """
    waiting = sorted(runs, key=lambda run: run.start is not None)
    rows: dict[str, Row] = {}
    started: dict[Future[Row], Run] = {}
    try:
        while waiting or started:
            # No more than are running: what is submitted can't be taken back.
            while waiting and len(started) < jobs and _may_start(waiting[0], started.values()):
                run = waiting.pop(0)
                if (row := _finished(run, folder)) is not None:
                    rows[run.name] = row
                else:
                    started[pool.submit(run_one, run, folder)] = run
            done, _ = wait(started, return_when=FIRST_COMPLETED)
            for future in done:
                run = started.pop(future)
                row = rows[run.name] = future.result()
                print(f"{len(rows)}/{len(runs)} {run.name}: {row['seconds']:.0f} s", flush=True)
    except BrokenProcessPool:
        names = ", ".join(run.name for run in started.values()) or run.name
        raise UserError(
            f"{names}: a process was killed (for memory?); lower --jobs and call it again: what is"
            " finished is kept"
        ) from None
    return [rows[run.name] for run in runs]


def _may_start(run: Run, running: Iterable[Run]) -> bool:
    return run.start is None or all(other.start is not None for other in running)


def run_one(run: Run, folder: Path) -> Row:
    """Train, unless that was done, and measure, in this process, whose output goes to log.txt.

    Errors: whatever goes wrong, with the run's name; log.txt has the traceback.
    """
    place = folder / run.name
    known = trained_as(run, folder)
    trained = _read(place / "trained.json")
    if trained.get("as") != known:
        shutil.rmtree(place, ignore_errors=True)  # was interrupted, or is of something else
        place.mkdir(parents=True)
    with (place / "log.txt").open("a") as stream:
        for output in (sys.stdout, sys.stderr):
            output.flush()
            os.dup2(stream.fileno(), output.fileno())
    try:
        if not (place / "trained.json").exists():
            begin = time.perf_counter()
            _train(run, folder)
            trained = {"as": known, "seconds": time.perf_counter() - begin}
            _write(place / "trained.json", trained)
        model = Trained(*load_for_inference(place))
        figures = {"seconds": float(trained["seconds"])}
        for measure in run.measures:
            figures |= measure(model)
    except UserError:
        raise
    except Exception as error:
        traceback.print_exc()
        raise UserError(f"{run.name}: {error!r}; see {place / 'log.txt'}") from None
    found = {"as": known, "measures": measured_as(run, folder), "figures": figures}
    _write(place / "result.json", found)
    return _row(run, figures)


def _train(run: Run, folder: Path) -> None:
    """Errors: the training fails, or was told to stop before its last step."""
    place, settings = folder / run.name, _settings(run, folder)
    file, log = place / "run.toml", place / "log.txt"
    file.write_text(_toml(settings), encoding="utf-8")
    if train.main(["--job.config_file", str(file)]):
        last = log.read_text(encoding="utf-8").strip().rpartition("\n")[2]
        raise UserError(f"{run.name}: the training failed: {last}; see {log}")
    found, steps = find_checkpoint(place).name, settings["training.steps"]
    if found != f"step-{steps}":
        raise UserError(f"{run.name}: stopped at {found} of {steps}; call it again to go on")


def trained_as(run: Run, folder: Path) -> Any:
    """What decides the weights: settings, the text (a file, or the interpreter's own files), what
    it starts from."""
    settings = _settings(run, folder)
    text = _hash(settings.get("training.dataset_path", ""))
    python = f"Python {platform.python_version()}"
    known: dict[str, Any] = {"settings": settings, "text": text or python}
    if run.start is not None:
        before = folder / folder_name(run.start, run.seed)
        known["start"] = _read(before / "trained.json").get("as")
    return _anywhere(known, folder)


def measured_as(run: Run, folder: Path) -> Any:
    """What decides the figures of these weights: the measures, their arguments and files."""
    told = []
    for measure in run.measures:
        _, *arguments = inspect.signature(measure).parameters.values()
        given = [f"{a.name}={a.default}" for a in arguments]
        given += [_hash(a.default) for a in arguments if isinstance(a.default, Path)]
        told.append(f"{getattr(measure, 'func', measure).__name__}({', '.join(given)})")
    return _anywhere(told, folder)


@functools.cache
def _hash(file: str | Path) -> str:
    """Of a file's bytes; of anything else, none."""
    path = Path(file)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else ""


def _anywhere(value: Any, folder: Path) -> Any:
    """The same wherever the folder lies."""
    text = json.dumps(value, ensure_ascii=False)
    return json.loads(text.replace(str(folder), "{folder}"))


def _finished(run: Run, folder: Path) -> Row | None:
    """The row of a run that is there already."""
    found = _read(folder / run.name / "result.json")
    same = found.get("as") == trained_as(run, folder)
    same &= found.get("measures") == measured_as(run, folder)
    return _row(run, found["figures"]) if same else None


def _row(run: Run, figures: Mapping[str, float]) -> Row:
    return {**run.factors, "seed": run.seed, **figures}


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _write(file: Path, value: Mapping[str, Any]) -> None:
    with written_whole(file) as whole:
        whole.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _settings(run: Run, folder: Path) -> dict[str, Any]:
    settings = {**BASE, **run.settings, "training.seed": run.seed}
    settings["job.dump_folder"] = str(folder / run.name)
    settings["job.description"] = run.name
    if run.start is not None:
        before = folder / folder_name(run.start, run.seed) / "checkpoint"
        settings["checkpoint.initial_load_path"] = str(before)
        settings["checkpoint.initial_load_model_only"] = True
    return settings


def _toml(settings: Mapping[str, Any]) -> str:
    tables: dict[str, list[str]] = {}
    for name, value in settings.items():
        table, _, key = name.rpartition(".")
        tables.setdefault(table, []).append(f"{key} = {json.dumps(value, ensure_ascii=False)}")
    return "\n\n".join("\n".join([f"[{table}]", *lines]) for table, lines in tables.items()) + "\n"
