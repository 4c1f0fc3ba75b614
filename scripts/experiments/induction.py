"""Gloeckle et al. 2024, section 4.1: with more than one token to predict, small models learn sooner
to look up what followed a word the last time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from experiments import texts
from experiments.design import Claim, Experiment, Figure, Panel, Run
from experiments.measures import cost, second_names

WIDTHS = (32, 64, 128)
HEADS = (1, 2, 4)


def prepare(folder: Path, quick: bool) -> None:
    texts.write_word_tokenizer(folder / "words")
    stories = texts.records(texts.story, 200 if quick else 60_000, seed=0)
    texts.write_records(folder / "stories.jsonl", stories)
    unseen = texts.records(texts.story, 20 if quick else 100, seed=1)
    texts.write_records(folder / "unseen.jsonl", unseen)


def runs(folder: Path, seeds: Sequence[int], quick: bool) -> list[Run]:
    return [
        Run(
            {"width": width, "n": n},
            seed,
            {
                "model.hf_assets_path": str(folder / "words"),
                "model.args.dim": width,
                "model.args.n_layers": 2,  # with head 1: the least that can look up
                "model.args.n_heads": width // 16,
                "model.args.hidden_dim": 3 * width,
                "mtp.num_future_tokens": n,
                "training.dataset": "stories",
                "training.dataset_path": str(folder / "stories.jsonl"),
                "training.seq_len": 64,
                "training.local_batch_size": 8,
                "training.steps": 3000,
                "lr_scheduler.warmup_steps": 100,
            },
            [cost, partial(second_names, file=folder / "unseen.jsonl")],
        )
        for width in (WIDTHS[:1] if quick else WIDTHS)
        for n in (HEADS[:2] if quick else HEADS)
        for seed in seeds
    ]


EXPERIMENT = Experiment(
    title="names that come again, by size of model",
    prepare=prepare,
    runs=runs,
    figures=[
        Figure("parameters", "parameters", 0),
        Figure("again", "second names right, %", 1, percent=True),
        Figure("first", "at first mention, %", 1, percent=True),
    ],
    claims=[
        Claim(
            f"width {width}: n = {n} completes more names than n = 1",
            source="section 4.1" if n == 2 else "",
            figure="again",
            of={"width": width, "n": n},
            than={"width": width, "n": 1},
            sign=1,
        )
        for width in WIDTHS
        for n in HEADS[1:]
    ],
    panels=[Panel("again", over="width", lines="n")],
)
