"""What the runs on the interpreter's own Python files have in common."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments.design import Figure
from experiments.measures import Measure, cost, decoding, held_out
from experiments.texts import Record, write_records
from torchtitan_mtp.data.sources import Source, find_source

WIDTH = 96
SPECIAL = ("asyncio", "email", "unittest", "multiprocessing", "concurrent", "importlib", "tkinter")


HEAD_1 = (Figure("loss 1", "head 1's loss", 3), Figure("bits per byte", "bits a byte", 3))
STEPS = ("text tokens a step", "tokens a step")
DRAFTING = (
    Figure("agreement 2", "head 2 as head 1, held-out text, %", 1, percent=True),
    Figure(STEPS[0], "tokens a step, held-out text"),
    Figure(STEPS[1], "tokens a step, own greedy text"),
    Figure("step cost", "cost of a step"),
    Figure("speed-up", "speed-up"),
    Figure("best speed-up", "best speed-up"),
    Figure("best drafts", "with drafts", 1, interval=False),
)


def on_python(folder: Path, quick: bool, steps: int) -> dict[str, Any]:
    """Settings of a small model that reads bytes of Python; quick ones, of what `prepare` wrote."""
    text = {"training.dataset_path": str(folder / "python")} if quick else {}
    return {
        "model.args.dim": WIDTH,
        "model.args.n_heads": 4,
        "model.args.hidden_dim": 256,
        "training.dataset": "python_stdlib",
        "training.seq_len": 192,
        "training.local_batch_size": 8,
        "training.steps": steps,
        "lr_scheduler.warmup_steps": steps // 10,
        "validation.enable": True,  # so that documents are held out; it is measured afterwards
        "validation.freq": 1_000_000,
        "validation.steps": 1,
        **text,
    }


def prepare(folder: Path, quick: bool) -> None:
    """A few of the files, for a quick trial; else the trainer finds them all."""
    if quick:
        (folder / "python").mkdir(exist_ok=True)
        for file in sorted(Path(sysconfig.get_path("stdlib"), "json").glob("*.py")):
            shutil.copy(file, folder / "python")


def write_parts(folder: Path, quick: bool) -> None:
    """The Python files as records: general.jsonl, and special.jsonl of some packages."""
    source = find_source(str(folder / "python") if quick else "python_stdlib")
    assert isinstance(source, Source)
    texts: dict[str, list[Record]] = {"general": [], "special": []}
    for i in range(len(source)):
        package = Path(source.where(i)).parent.name
        texts["special" if package in SPECIAL else "general"].append({"text": source[i].text})
    for name, found in texts.items():
        write_records(folder / f"{name}.jsonl", found if found else texts["general"])


def measures(quick: bool) -> Sequence[Measure]:
    """What heads cost and what they are worth."""
    if not quick:
        return [cost, held_out, decoding]
    few = partial(decoding, prompts=2, new=8, timed=1, repeats=1)
    return [cost, partial(held_out, batches=1), few]
