"""Parallel heads beside DeepSeek-V3's modules (arXiv 2412.19437, section 2.2), unshared, shared,
and reading the trunk's state before its norm: at equal parameters and at equal FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.design import Claim, Experiment, Factors, Figure, Panel, Run
from experiments.python_text import DRAFTING, HEAD_1, STEPS, measures, on_python, prepare

N = 4
# By name: layers of the next-token model, width of the feed-forwards, steps, and the [mtp] table.
# Feed-forwards give what the modules' projections take, so that all that say "parameters" or "both"
# have the same number, and all that say "FLOPs" or "both" train for as many FLOPs, to 0.3 %.
_CHAIN = {"mtp.num_future_tokens": N, "mtp.heads": "sequential"}
VARIANTS: dict[tuple[str, str], tuple[int, int, int, dict[str, Any]]] = {
    ("none", "parameters"): (6, 256, 400, {"mtp.num_future_tokens": 1}),
    ("none", "FLOPs"): (3, 256, 861, {"mtp.num_future_tokens": 1}),
    ("parallel", "both"): (3, 256, 400, {"mtp.num_future_tokens": N}),
    ("sequential", "both"): (3, 224, 400, _CHAIN),
    ("sequential, raw state", "both"): (3, 224, 400, _CHAIN | {"mtp.trunk_state": "raw"}),
    ("shared", "parameters"): (5, 245, 400, _CHAIN | {"mtp.share_weights": True}),
    ("shared", "FLOPs"): (3, 224, 400, _CHAIN | {"mtp.share_weights": True}),
}


def runs(folder: Path, seeds: Sequence[int], quick: bool) -> list[Run]:
    return [
        Run(
            _of(heads, equal),
            seed,
            {
                **on_python(folder, quick, steps),
                "model.args.n_layers": layers,
                "model.args.hidden_dim": width,
                **mtp,
            },
            measures(quick),
        )
        for (heads, equal), (layers, width, steps, mtp) in VARIANTS.items()
        for seed in seeds
        if not quick or heads in ("parallel", "sequential")
    ]


def _of(heads: str, equal: str) -> dict[str, str | int]:
    return {"heads": heads, "equal": equal}


_NONE, _NONE_LONGER = _of("none", "parameters"), _of("none", "FLOPs")
_PARALLEL, _MODULES = _of("parallel", "both"), _of("sequential", "both")
_RAW = _of("sequential, raw state", "both")
_SHARED_DEEPER, _SHARED = _of("shared", "parameters"), _of("shared", "FLOPs")


def _better(what: str, of: Factors, than: Factors) -> list[Claim]:
    """Questions of this project: are the drafts of one better, and its head 1?"""
    claims = [Claim(f"{what} draft better", "", figure, of, than, 1) for figure in STEPS]
    return [*claims, Claim(f"{what} have the better head 1", "", "loss 1", of, than, -1)]


EXPERIMENT = Experiment(
    title="parallel heads and sequential modules, at equal parameters and equal FLOPs",
    prepare=prepare,
    runs=runs,
    figures=[
        Figure("parameters", "parameters", 0),
        Figure("TFLOP", "TFLOP"),
        HEAD_1[0],
        *DRAFTING,
    ],
    claims=[
        *_better("modules, beside parallel heads,", _MODULES, _PARALLEL),
        Claim("modules decode faster", "", "best speed-up", _MODULES, _PARALLEL, 1),
        *_better("modules that read the normalised state, beside the raw one,", _MODULES, _RAW),
        *_better("equal parameters: shared modules", _SHARED_DEEPER, _MODULES),
        *_better("equal FLOPs: shared modules", _SHARED, _MODULES),
        *(
            Claim(
                f"equal {what}: parallel heads make head 1 worse than none",
                source="Gloeckle et al., section 3.1, of the smallest models",
                figure="loss 1",
                of=_PARALLEL,
                than=none,
                sign=1,
            )
            for what, none in (("parameters", _NONE), ("FLOPs", _NONE_LONGER))
        ),
        *(
            Claim(
                f"equal {what}: modules make head 1 better than none",
                source="DeepSeek-V3, section 4.5.1, of n = 2",
                figure="loss 1",
                of=_MODULES,
                than=none,
                sign=-1,
            )
            for what, none in (("parameters", _NONE), ("FLOPs", _NONE_LONGER))
        ),
    ],
    panels=[
        Panel("loss 1", over="heads", lines="equal"),
        Panel(STEPS[0], over="heads", lines="equal"),
        Panel("best speed-up", over="heads", lines="equal"),
    ],
)
