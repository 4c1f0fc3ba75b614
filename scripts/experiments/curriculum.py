"""arXiv 2505.22757: heads that come or go during the training; and the fine-tuning of Gloeckle et
al. 2024, section 3.6: n = 4 first, then n' = 1 or 4 on another text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments import python_text
from experiments.design import Claim, Experiment, Figure, Panel, Run
from experiments.measures import words
from experiments.python_text import DRAFTING, HEAD_1, STEPS, measures, on_python

N = 4
PRETRAINED: dict[str, dict[str, Any]] = {  # by the heads' schedule
    "n = 1": {"mtp.num_future_tokens": 1},
    "n = 4": {"mtp.num_future_tokens": N},
    "n = 4, forward": {"mtp.num_future_tokens": N, "mtp.curriculum": "forward"},
    "n = 4, reverse": {"mtp.num_future_tokens": N, "mtp.curriculum": "reverse"},
}
TUNED = (("n = 1", 1), ("n = 4", 1), ("n = 4", N))  # where from, and n'


def prepare(folder: Path, quick: bool) -> None:
    python_text.prepare(folder, quick)
    python_text.write_parts(folder, quick)


def runs(folder: Path, seeds: Sequence[int], quick: bool) -> list[Run]:
    general, special = (_on(folder, quick, part) for part in ("general", "special"))
    first = [
        Run(_of(name), seed, general | mtp, measures(quick))
        for name, mtp in PRETRAINED.items()
        for seed in seeds
        if not quick or "," not in name
    ]
    tuned = [
        Run(
            _of(before, n),
            seed,
            special | {"mtp.num_future_tokens": n, "training.steps": 150},
            [partial(words, prompts=8) if quick else words],
            start=_of(before),
        )
        for before, n in (TUNED[1:2] if quick else TUNED)
        for seed in seeds
    ]
    return first + tuned


def _on(folder: Path, quick: bool, part: str) -> dict[str, Any]:
    """Settings of a model of four layers, head 1's included, that reads `part` of the files."""
    path = str(folder / f"{part}.jsonl")
    return {
        **on_python(folder, quick, 300),
        "model.args.n_layers": 4,
        "training.dataset": part,
        "training.dataset_path": path,
    }


def _of(before: str, after: int | str = "-") -> dict[str, str | int]:
    return {"pre-training": before, "n'": after}


_N1, _N4 = _of("n = 1"), _of("n = 4")
_FORWARD, _REVERSE = _of("n = 4, forward"), _of("n = 4, reverse")
_SOURCE, _CODE = "arXiv 2505.22757", "Gloeckle et al., section 3.6"

EXPERIMENT = Experiment(
    title="heads that come or go, and fine-tuning after n = 4",
    prepare=prepare,
    runs=runs,
    figures=[
        HEAD_1[0],
        *DRAFTING,
        Figure("tuned loss", "loss after tuning", 3),
        Figure("words", "words right, %", 1, percent=True),
    ],
    claims=[
        Claim("no curriculum: head 1 is worse than with n = 1", _SOURCE, "loss 1", _N4, _N1, 1),
        *(
            Claim(f"{name}: head 1 is better than without", _SOURCE, "loss 1", of, _N4, -1)
            for name, of in (("forward", _FORWARD), ("reverse", _REVERSE))
        ),
        *(
            Claim(f"{name}: head 1 is better than with n = 1", "", "loss 1", of, _N1, -1)
            for name, of in (("forward", _FORWARD), ("reverse", _REVERSE))
        ),
        *(
            Claim(f"{name}: drafts are worse than without", source, figure, of, _N4, -1)
            for name, of, source in (("forward", _FORWARD, ""), ("reverse", _REVERSE, _SOURCE))
            for figure in STEPS
        ),
        *(
            Claim(f"tuned with n' = {n}, n = 4 is better than n = 1", _CODE, figure, a, b, sign)
            for n, a, b in ((n, _of("n = 4", n), _of("n = 1", 1)) for n in (1, N))
            for figure, sign in (("tuned loss", -1), ("words", 1))
        ),
        *(
            Claim("after n = 4, n' = 1 is better than n' = 4", _CODE, figure, a, b, sign)
            for a, b in ((_of("n = 4", 1), _of("n = 4", N)),)
            for figure, sign in (("tuned loss", -1), ("words", 1))
        ),
    ],
    panels=[
        Panel("loss 1", over="pre-training", where={"n'": "-"}),
        Panel(STEPS[0], over="pre-training", where={"n'": "-"}),
        Panel("words", over="pre-training", lines="n'"),
    ],
)
