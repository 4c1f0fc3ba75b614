"""`benchmark.py loss`: time and peak memory of linear cross-entropies, and the physical limit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.loss_peers import PEERS
from benchmarks.measure import (
    Measurement,
    fastest,
    matmul_flops_per_second,
    measure,
    row_of,
)
from benchmarks.report import report

DEFAULT_SIZES = ("4096x512x32768", "4096x512x128256")
DEFAULT_OPS = ("chunked", "torch_512", "titan_chunked", "checkpointed", "naive")


def run(
    sizes: tuple[str, ...] = DEFAULT_SIZES,
    heads: tuple[int, ...] = (1,),
    dtypes: tuple[str, ...] = ("float32",),
    ops: tuple[str, ...] = DEFAULT_OPS,
    repeats: int = 2,
    rounds: int = 2,
    json: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Forward and backward of linear cross-entropy, each case in its own process.

    Args:
        sizes: rows x width x vocabulary, as NxDxV.
        heads: numbers of heads that share the unembedding.
        dtypes: dtypes of hiddens and weight.
        ops: which implementations (see scripts/benchmarks/loss_peers.py).
        repeats: timed calls a process; the smallest counts.
        rounds: processes a case, taken in turn, so that other load falls on all alike.
        json: file for the figures.
        plot: PNG file for a bar chart.
    """
    rows: list[dict[str, Any]] = []
    for size in sizes:
        n_rows, dim, vocab = (int(part) for part in size.split("x"))
        for dtype in dtypes:
            for n in heads:
                shape = {"n": n, "n_rows": n_rows, "dim": dim, "vocab": vocab, "dtype": dtype}
                rows += compare(shape, ops, repeats, rounds)
    seconds = "wall_s" if torch.cuda.is_available() else "cpu_s"
    report(rows, json, plot, bars=(seconds, "peak_mib"))


def compare(
    shape: dict[str, Any], ops: tuple[str, ...], repeats: int, rounds: int
) -> list[dict[str, Any]]:
    """All implementations at one shape, then the physical limit."""
    best: dict[str, Measurement] = {}
    rates = []
    dtype = getattr(torch, shape["dtype"])
    for _ in range(rounds):
        rates.append(matmul_flops_per_second(_fast_dtype(dtype)))
        for op in ops:
            new = measure(prepare, repeats, op=op, **shape)
            best[op] = fastest(best.get(op, new), new)
    limit = _limit(shape, max(rates))
    rows = []
    for op, measurement in {**best, "limit": limit}.items():
        size = f"{shape['n_rows']}x{shape['dim']}x{shape['vocab']}"
        own = limit.seconds * (8 / 6 if op.startswith("distilled") else 1)
        ratio = measurement.seconds / own
        rows.append(
            {"size": size, "dtype": shape["dtype"], "heads": shape["n"], "op": op}
            | row_of(measurement)
            | {"time / limit": ratio}
        )
    return rows


def _limit(shape: dict[str, Any], rate: float) -> Measurement:
    """6 n N D V FLOPs at the measured matmul rate (a teacher's logits: 8, in its row's ratio);
    memory: the gradients themselves."""
    n, n_rows, dim, vocab = (shape[key] for key in ("n", "n_rows", "dim", "vocab"))
    seconds = 6 * n * n_rows * dim * vocab / rate
    wall = seconds if torch.cuda.is_available() else seconds / torch.get_num_threads()
    item = getattr(torch, shape["dtype"]).itemsize
    return Measurement(seconds, wall, (vocab * dim + n * n_rows * dim) * item / 2**20)


def _fast_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype whose matmul is the limit: float32 on CPUs that only emulate bfloat16."""
    if torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return dtype
    return torch.float32


def prepare(op: str, n: int, n_rows: int, dim: int, vocab: int, dtype: str) -> Callable[[], None]:
    """Inputs of a case, and one step of it: forward, backward, gradients dropped."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def inputs(n_rows: int, vocab: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        kind: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device}
        hiddens = [torch.randn(n_rows, dim, **kind).requires_grad_() for _ in range(n)]
        weight = torch.randn(vocab, dim, **kind).mul_(dim**-0.5).requires_grad_()
        labels = torch.randint(vocab, (n_rows, n), device=device)
        return hiddens, weight, labels

    function = PEERS[op]
    # A small run first starts thread pools and compilers; nothing of it may count as peak memory.
    function(*inputs(min(n_rows, 1024), min(vocab, 256)))
    hiddens, weight, labels = inputs(n_rows, vocab)

    def step() -> None:
        function(hiddens, weight, labels)
        weight.grad = None
        for hidden in hiddens:
            hidden.grad = None

    return step
