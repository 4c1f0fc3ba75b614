"""`benchmark.py heads`: what a training step costs with n heads, over what its arithmetic costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import fake_gpu as fake
from benchmarks.head_peers import PEERS
from benchmarks.measure import (
    Measurement,
    fastest,
    in_process,
    matmul_flops_per_second,
    measure,
)
from benchmarks.report import report
from torchtitan_mtp.config import MTP, ActivationCheckpoint
from torchtitan_mtp.config import Optimizer as OptimizerConfig
from torchtitan_mtp.data.targets import IGNORE, Batch, Window, make_batch
from torchtitan_mtp.distributed.activation_checkpoint import apply_activation_checkpointing
from torchtitan_mtp.distributed.mesh import Degrees
from torchtitan_mtp.models.args import ModelArgs
from torchtitan_mtp.models.transformer import Transformer, build_model
from torchtitan_mtp.monitoring.flops import forward_backward_flops_per_token
from torchtitan_mtp.mtp import ENGINES, add_heads, head_scales, head_weights
from torchtitan_mtp.ops import LossOptions, LossOutput
from torchtitan_mtp.optimizer import build_optimizer, clip_gradients

# case -> (heads, engine): ours, and behind them what users have today (head_peers.py).
CASES = {
    "parallel, joint": ("parallel", "joint"),
    "parallel, head by head": ("parallel", "head_by_head"),
    "chain": ("sequential", "head_by_head"),
    "medusa": ("medusa", "head_by_head"),
} | {name: ("parallel", name) for name in PEERS}


def run(
    heads: tuple[int, ...] = (1, 2, 4, 8),
    cases: tuple[str, ...] = tuple(CASES)[:3],
    layers: int = 6,
    dim: int = 512,
    vocab: int = 32768,
    seq_len: int = 1024,
    batch_size: int = 1,
    ac: str = "none",
    dtype: str = "float32",
    repeats: int = 3,
    rounds: int = 2,
    fake_gpu: bool = False,
    json: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Whole training steps (forward, loss, backward, clip, AdamW), each case in its own process.

    Ratios are to n = 1, the plain next-token model. Memory is the peak above parameters, their
    gradients and the optimizer's state. On CPUs: one thread, CPU-seconds.

    Args:
        heads: values of n; must hold 1.
        cases: heads and engine, as "parallel, joint"; or a peer of head_peers.py.
        layers: blocks of the model, the first head's included.
        dim: width.
        vocab: size of the vocabulary.
        seq_len: tokens a sequence.
        batch_size: sequences a step.
        ac: activation checkpointing, none or full.
        dtype: dtype of parameters and products.
        repeats: timed steps a process; the smallest counts.
        rounds: processes a case, taken in turn, so that other load falls on all alike.
        fake_gpu: memory alone, as tensors have it on a GPU, without one.
        json: file for the figures.
        plot: PNG file for a bar chart.
    """
    sizes = {"layers": layers, "dim": dim, "vocab": vocab, "seq_len": seq_len}
    sizes |= {"batch_size": batch_size, "ac": ac, "dtype": dtype}
    if fake_gpu:
        rows = memory_table(heads, cases, sizes)
        return report(rows, json, plot, bars=("peak MiB",))
    rows = table(heads, cases, sizes, repeats, rounds)
    report(rows, json, plot, bars=("s", "peak MiB"))


def table(
    heads: tuple[int, ...],
    cases: tuple[str, ...],
    sizes: dict[str, Any],
    repeats: int,
    rounds: int,
) -> list[dict[str, Any]]:
    """A row for n = 1, one for every case and n > 1, and the physical limit at the largest n."""
    plan = [("plain", 1)] + [(case, n) for n in heads if n > 1 for case in cases]
    best: dict[tuple[str, int], Measurement] = {}
    rates = []
    for _ in range(rounds):
        rates.append(matmul_flops_per_second(getattr(torch, sizes["dtype"]), threads=1))
        for case, n in plan:
            new = measure(prepare, repeats, threads=1, case=case, n=n, **sizes)
            best[case, n] = fastest(best.get((case, n), new), new)
    base, tokens = best["plain", 1], sizes["batch_size"] * sizes["seq_len"]
    base_flops = tokens * flops_per_token("plain", 1, sizes)
    rows = []
    for (case, n), found in best.items():
        flops = tokens * flops_per_token(case, n, sizes)
        rows.append(_row(case, n, flops / base_flops, found, base))
    biggest = max(n for _, n in plan)
    flops = tokens * max(flops_per_token(case, n, sizes) for case, n in plan)
    limit = Measurement(flops / max(rates), flops / max(rates), 0.0)
    return [*rows, _row("limit: measured matmul rate", biggest, flops / base_flops, limit, base)]


def memory_table(
    heads: tuple[int, ...], cases: tuple[str, ...], sizes: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows as those of `table`, of what a fake GPU can tell."""
    plan = [("plain", 1)] + [(case, n) for n in heads if n > 1 for case in cases]
    peaks = [in_process(_peak_on_fake_gpu, case, n, sizes) for case, n in plan]
    return [
        {"case": case, "n": n, "peak MiB": peak, "peak / n=1": peak / peaks[0]}
        for (case, n), peak in zip(plan, peaks, strict=True)
    ]


def _peak_on_fake_gpu(case: str, n: int, sizes: dict[str, Any]) -> float:
    model, mtp = model_of(case, n, sizes)
    with fake.fake_gpu(Degrees()) as (world, allocations):
        fake.put_on(model, world.device)
        step = steps_of(model, mtp, case, sizes, world.device)
        before = allocations.alive
        allocations.begin()
        step()
        return (allocations.peak - before) / 2**20


def _row(case: str, n: int, flops: float, found: Measurement, base: Measurement) -> dict[str, Any]:
    ratio = found.seconds / base.seconds
    return {
        "case": case,
        "n": n,
        "s": found.seconds,
        "FLOPs / n=1": flops,
        "time / n=1": ratio,
        "time / FLOPs": ratio / flops,
        "peak MiB": found.peak_mib,
        "peak / n=1": found.peak_mib / base.peak_mib,
        "more MiB": found.peak_mib - base.peak_mib,
    }


def model_of(case: str, n: int, sizes: dict[str, Any]) -> tuple[Transformer, MTP]:
    """The model on the meta device, and its [mtp] table."""
    family, engine = CASES.get(case, ("parallel", "joint"))
    mtp = MTP(heads=family, num_future_tokens=n, engine=engine)
    args = ModelArgs(
        dim=sizes["dim"],
        n_layers=sizes["layers"],
        n_heads=max(1, sizes["dim"] // 64),
        vocab_size=sizes["vocab"],
        max_seq_len=sizes["seq_len"],
    )
    return add_heads(build_model(args, getattr(torch, sizes["dtype"])), mtp), mtp


def flops_per_token(case: str, n: int, sizes: dict[str, Any]) -> int:
    """FLOPs that a token needs; recomputation is not counted."""
    model, _ = model_of(case, n, sizes)
    return forward_backward_flops_per_token(model, sizes["seq_len"])


def prepare(case: str, n: int, **sizes: Any) -> Callable[[], None]:
    """A model and optimizer after one step, whose gradients are still there; the next steps."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, mtp = model_of(case, n, sizes)
    model.to_empty(device=device)
    model.init_weights(seed=0)
    return steps_of(model, mtp, case, sizes, device)


def steps_of(
    model: Transformer, mtp: MTP, case: str, sizes: dict[str, Any], device: torch.device
) -> Callable[[], None]:
    """As `prepare`, of a model that is there."""
    n = mtp.num_future_tokens
    # A peer's heads are checkpointed as the mode says, no more.
    engine = "head_by_head" if case in PEERS else mtp.engine
    apply_activation_checkpointing(model, ActivationCheckpoint(mode=sizes["ac"]), engine)
    optimizer = build_optimizer(model.parameters(), OptimizerConfig())
    batch = random_batch(sizes, n, device)
    valid = (batch.labels != IGNORE).sum((0, 1))
    scales = head_scales(head_weights(mtp, 1, 10), valid)
    run_heads: Callable[..., LossOutput] = (ENGINES | PEERS)[mtp.engine]

    def forward_backward_update() -> None:
        run_heads(model, batch, scales, LossOptions(), True)
        clip_gradients(model, 1.0)
        optimizer.step()

    def step() -> None:
        forward_backward_update()
        optimizer.zero_grad()

    # The gradients stay for the first measured step, whose memory counts: as in any micro-batch but
    # the first, so that gradients not yet there cannot make room for activations.
    forward_backward_update()
    return step


def random_batch(sizes: dict[str, Any], n: int, device: torch.device) -> Batch:
    """Uniform tokens, one document a sequence, every target valid."""
    generator = torch.Generator().manual_seed(0)
    shape = (sizes["batch_size"], sizes["seq_len"] + n)
    tokens = torch.randint(sizes["vocab"], shape, generator=generator)
    return make_batch(Window(tokens, torch.zeros(shape, dtype=torch.int64)), n).to(device)
