"""`benchmark.py decode`: what heads gain in decoding, beside what the arithmetic allows."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import report
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.inference import generate, load_for_inference
from torchtitan_mtp.inference.decoding import Decoder, most_drafts
from torchtitan_mtp.inference.load import find_device
from torchtitan_mtp.inference.sampling import Sampler
from torchtitan_mtp.models.trunk import Trunk

PROMPTS = (
    "class Reader:\n    def __init__(self, path):\n",
    "import os\n\ndef main(argv):\n    ",
    "def test_parse(self):\n        result = ",
)


def run(
    checkpoint: Path,
    prompts: tuple[str, ...] = PROMPTS,
    max_new_tokens: int = 200,
    modes: tuple[str, ...] = ("eager", "compiled"),
    drafts: tuple[int, ...] = (),
    repeats: int = 10,
    threads: int = 1,
    device: str | None = None,
    json: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Greedy decoding with and without drafts, prompt by prompt, in turn, after the prompt.

    With L the trunk's blocks, head 1's included, a step with d drafts runs L + d blocks where a
    plain one runs L. "bound" is tokens a step times L / (L + d): what would be gained if a block
    cost as much on d + 1 tokens as on one, and nothing else cost anything. "limit" counts all
    matrix products, the modules' projections and every head's output among them, at what the
    trunk's forward over d + 1 tokens is measured to cost ("d + 1 tokens / 1").

    Args:
        checkpoint: a step-N folder, a run's folder or a Hugging Face folder, with heads.
        prompts: texts to continue, one at a time.
        max_new_tokens: tokens of each continuation.
        modes: eager, compiled (a whole step as one graph); on a GPU also graphs (a step launched as
            one CUDA graph) and compiled_graphs.
        drafts: how many a step, a line each; default: as many as the heads can.
        repeats: the fastest counts.
        threads: of torch, on CPUs.
        device: default: cuda where there is one, else cpu.
        json: file for the figures.
        plot: PNG file for a bar chart.
    """
    torch.set_num_threads(threads)
    model, tokenizer, _ = load_for_inference(checkpoint, find_device(device))
    if model.mtp is None:
        raise UserError(f"benchmark decode: {checkpoint} has no heads 2..n, which draft")
    texts = [tokenizer.prompt(text) for text in prompts]
    counts = [most_drafts(model, count) for count in drafts or (None,)]
    rows = [
        row(model, texts, max_new_tokens, mode, count, repeats)
        for mode in modes
        for count in counts
    ]
    report(rows, json, plot, bars=("plain tokens/s", "speculative tokens/s"))


def row(
    model: Trunk,
    texts: list[list[int]],
    max_new_tokens: int,
    mode: str,
    drafts: int,
    repeats: int,
) -> dict[str, Any]:
    """One line of the table."""
    layers, how = (
        len(model.layers),
        {"compile": "compiled" in mode, "cuda_graphs": "graphs" in mode},
    )
    seconds, steps = {False: 0.0, True: 0.0}, {False: 0, True: 0}
    for text in texts:
        best, count = {False: float("inf"), True: float("inf")}, {}
        for attempt in range(repeats + 1):  # the first one warms up
            for speculative in (False, True):
                stats = generate(
                    model,
                    [text],
                    max_new_tokens,
                    speculative=speculative,
                    num_draft=drafts,
                    **how,
                ).stats
                if attempt:
                    spent = stats.seconds - stats.prompt_seconds
                    best[speculative] = min(best[speculative], spent)
                count[speculative] = stats.steps
        for speculative in (False, True):
            seconds[speculative] += best[speculative]
            steps[speculative] += count[speculative]
    per_step, gain = steps[False] / steps[True], seconds[False] / seconds[True]
    bound = per_step * layers / (layers + drafts)
    cost = cost_of_tokens(model, texts[0], 1 + drafts, how, repeats)
    trunk, drafting = products(model, drafts)
    limit = per_step * trunk / (trunk + drafting) / cost
    return {
        "mode": mode,
        "heads": model.spec.heads,
        "L": layers,
        "drafts": drafts,
        "tokens/step": per_step,
        "plain tokens/s": steps[False] / seconds[False],
        "speculative tokens/s": steps[False] / seconds[True],
        "speed-up": gain,
        "bound": bound,
        "of bound": gain / bound,
        "d + 1 tokens / 1": cost,
        "limit": limit,
        "of limit": gain / limit,
    }


def products(model: Trunk, drafts: int) -> tuple[int, int]:
    """Multiplications of a token with weights: in the trunk and head 1, in drafting heads."""

    def matrices(module: torch.nn.Module) -> int:
        return sum(weight.numel() for weight in module.parameters() if weight.ndim == 2)

    output = model.output.weight.numel()
    return matrices(model.layers) + output, drafts * (matrices(model.mtp.heads[0]) + output)


@torch.inference_mode()
def cost_of_tokens(
    model: Trunk, text: list[int], n: int, how: dict[str, bool], repeats: int
) -> float:
    """Time of the trunk's forward over n tokens after `text` over that over one."""
    decoder = Decoder(model, [text], 200, 0, Sampler(), **how)
    decoder.prefill()
    seconds = []
    for drafts in (0, n - 1):
        plan = decoder.plan(0)._replace(drafts=drafts)
        seconds.append(fastest(lambda plan=plan: decoder.run(plan).tolist(), 20 * repeats))
    return seconds[1] / seconds[0]


def fastest(function: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest call but the first."""
    best = float("inf")
    for attempt in range(repeats + 1):
        begin = time.perf_counter()
        function()
        if attempt:
            best = min(best, time.perf_counter() - begin)
    return best
