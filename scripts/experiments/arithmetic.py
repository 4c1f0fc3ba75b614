"""Gloeckle et al. 2024, section 4.2 and appendix K: polynomials over F7, with as many operations as
in training and with more, with pause tokens and without."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from experiments import texts
from experiments.design import Claim, Experiment, Figure, Panel, Run
from experiments.measures import Measure, completions, cost

HEADS = (1, 2, 4)
LONGER = "1, FLOPs of 4"
STEPS = {1: 2500, 2: 2500, 4: 2500, LONGER: 5532}  # by n
PAUSES = (0, 4)
DEGREE = 2  # modulo X^2; the paper's is 5
SEEN, MORE = (1, 2), (3, 4)  # operations


def _task(rng: random.Random, operations: Sequence[int], pauses: int) -> texts.Record:
    return texts.polynomial_task(rng, rng.choice(operations), DEGREE, pauses)


def prepare(folder: Path, quick: bool) -> None:
    """What is asked first, each question once; no training text has one of these."""
    for pauses in PAUSES:
        asked: set[str] = set()
        for operations in (*SEEN, *MORE):
            make = partial(_task, operations=[operations], pauses=pauses)
            tasks = texts.records(make, 40 if quick else 500, seed=operations)
            found = {record["prompt"]: record for record in tasks}
            texts.write_records(folder / f"asked-{pauses}-{operations}.jsonl", found.values())
            asked |= found.keys()
        make = partial(_task, operations=SEEN, pauses=pauses)
        tasks = texts.records(make, 4000 if quick else 500_000, seed=0)
        unasked = (record for record in tasks if record["prompt"] not in asked)
        texts.write_records(folder / f"train-{pauses}.jsonl", unasked)


def _measures(folder: Path, pauses: int) -> list[Measure]:
    asked = [
        partial(completions, file=folder / f"asked-{pauses}-{m}.jsonl", name=f"right at {m}")
        for m in (*SEEN, *MORE)
    ]
    return [cost, *asked]


def runs(folder: Path, seeds: Sequence[int], quick: bool) -> list[Run]:
    variants: list[tuple[int, int | str]] = [(0, 1), (0, 2)]
    if not quick:
        variants = [*itertools.product(PAUSES, HEADS), (0, LONGER)]
    return [
        Run(
            {"pauses": pauses, "n": n},
            seed,
            {
                "model.args.dim": 64,
                "model.args.n_layers": 3,
                "model.args.n_heads": 4,
                "model.args.hidden_dim": 192,
                "mtp.num_future_tokens": 1 if n == LONGER else n,
                "training.dataset": "polynomials",
                "training.dataset_path": str(folder / f"train-{pauses}.jsonl"),
                "training.seq_len": 64,
                "training.local_batch_size": 32,
                "training.steps": STEPS[n],
                "lr_scheduler.warmup_steps": 100,
            },
            _measures(folder, pauses),
        )
        for pauses, n in variants
        for seed in seeds
    ]


def _told(operations: int, pauses: int = 0) -> str:
    text = f"{operations} operation{'s' * (operations > 1)}"
    text += " (unseen)" if operations in MORE else ""
    return f"{text}, {pauses} pause tokens" if pauses else text


EXPERIMENT = Experiment(
    title="polynomials over F7, in and out of domain, with pause tokens and without",
    prepare=prepare,
    runs=runs,
    figures=[
        Figure("parameters", "parameters", 0),
        Figure("TFLOP", "TFLOP"),
        *(Figure(f"right at {m}", f"right, {_told(m)}, %", 1, True) for m in (*SEEN, *MORE)),
    ],
    claims=[
        *(
            Claim(
                f"{_told(m, pauses)}: n = {n} is right more often than n = 1",
                source="appendix K" if pauses else "section 4.2",
                figure=f"right at {m}",
                of={"pauses": pauses, "n": n},
                than={"pauses": pauses, "n": 1},
                sign=1,
            )
            for pauses in PAUSES
            for m in (*SEEN, MORE[0])
            for n in HEADS[1:]
        ),
        *(
            Claim(
                f"{_told(m)}: n = 4 is right more often than n = 1 with as many FLOPs",
                source="",
                figure=f"right at {m}",
                of={"pauses": 0, "n": 4},
                than={"pauses": 0, "n": LONGER},
                sign=1,
            )
            for m in SEEN
        ),
        *(
            Claim(
                f"{_told(SEEN[-1])}, n = {n}: pause tokens help",
                source="",
                figure=f"right at {SEEN[-1]}",
                of={"pauses": PAUSES[1], "n": n},
                than={"pauses": PAUSES[0], "n": n},
                sign=1,
            )
            for n in HEADS
        ),
    ],
    panels=[Panel(f"right at {m}", over="n", lines="pauses") for m in (SEEN[0], SEEN[-1], MORE[0])],
)
