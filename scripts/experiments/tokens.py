"""Gloeckle et al. 2024, sections 3.2 and 3.3: what heads are worth in decoding, on bytes and on
tokens of several bytes, and what they cost head 1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments import python_text
from experiments.design import Claim, Experiment, Figure, Panel, Run
from experiments.python_text import DRAFTING, HEAD_1, STEPS, measures, on_python
from torchtitan_mtp.cli import train_tokenizer

VOCABULARY = 4096
HEADS = {"bytes": (1, 2, 4, 8), "4k tokens": (1, 2, 4)}


def prepare(folder: Path, quick: bool) -> None:
    python_text.prepare(folder, quick)
    source, size = (str(folder / "python"), 300) if quick else ("python_stdlib", VOCABULARY)
    train_tokenizer.train(source, size, folder / "tokens" / "python.tiktoken")


def runs(folder: Path, seeds: Sequence[int], quick: bool) -> list[Run]:
    """Nine blocks, heads' included, and the same steps; a step reads about the same text of either,
    a token being some three bytes."""
    assets = {"bytes": "byte", "4k tokens": str(folder / "tokens")}
    lengths = {"bytes": 192, "4k tokens": 64}
    return [
        Run(
            {"unit": unit, "n": n},
            seed,
            {
                **on_python(folder, quick, 300),
                "model.hf_assets_path": assets[unit],
                "model.args.n_layers": 9,
                "mtp.num_future_tokens": n,
                "mtp.match_parameters": True,
                "training.seq_len": lengths[unit],
            },
            measures(quick),
        )
        for unit, heads in HEADS.items()
        for n in (heads[1:2] if quick else heads)
        for seed in seeds
    ]


def _of(unit: str, n: int) -> dict[str, str | int]:
    return {"unit": unit, "n": n}


EXPERIMENT = Experiment(
    title="bytes and tokens: acceptance, decoding speed, and head 1's loss",
    prepare=prepare,
    runs=runs,
    figures=[
        Figure("parameters", "parameters", 0),
        *HEAD_1,
        *DRAFTING,
    ],
    claims=[
        *(
            Claim(
                f"{unit}: n = {n} decodes faster with its drafts than without",
                source="sections 3.2, 3.3",
                figure="speed-up",
                of=_of(unit, n),
                than=1.0,
                sign=1,
            )
            for unit, heads in HEADS.items()
            for n in heads[1:]
        ),
        *(
            Claim(
                f"{unit}: head 1 of n = {n} is worse than that of n = 1",
                source="section 3.1, of the smallest models",
                figure="bits per byte",
                of=_of(unit, n),
                than=_of(unit, 1),
                sign=1,
            )
            for unit, heads in HEADS.items()
            for n in heads[1:]
        ),
        *(
            Claim(
                "n = 4: a step yields more bytes than 4k tokens",
                source="",
                figure=figure,
                of=_of("bytes", 4),
                than=_of("4k tokens", 4),
                sign=1,
            )
            for figure in STEPS
        ),
        *(
            Claim(
                "bytes: n = 8 yields more a step than n = 4",
                source="section 3.3",
                figure=figure,
                of=_of("bytes", 8),
                than=_of("bytes", 4),
                sign=1,
            )
            for figure in STEPS
        ),
    ],
    panels=[
        Panel("tokens a step", over="n", lines="unit"),
        Panel("speed-up", over="n", lines="unit", title="speed-up with n - 1 drafts"),
        Panel("bits per byte", over="n", lines="unit"),
    ],
)
