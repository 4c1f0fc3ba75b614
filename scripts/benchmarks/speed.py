"""`benchmark.py speed`: a plain model's training step beside the matrix products of its process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.heads import random_batch
from benchmarks.measure import (
    in_process,
    matmul_flops_per_second,
)
from benchmarks.report import report
from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.distributed.mesh import init_world
from torchtitan_mtp.distributed.parallelize import parallelize
from torchtitan_mtp.models.flavors import flavors
from torchtitan_mtp.models.transformer import build_model
from torchtitan_mtp.mtp import ENGINES
from torchtitan_mtp.ops import LossOptions
from torchtitan_mtp.optimizer import build_optimizer, clip_gradients


def run(
    dtype: str = "float32",
    modes: tuple[str, ...] = ("eager", "compiled"),
    layers: int = 6,
    dim: int = 256,
    n_heads: int = 16,
    vocab: int = 2048,
    seq_len: int = 512,
    batch_size: int = 4,
    matmul: int = 2048,
    steps: int = 6,
    warmup: int = 2,
    json: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Whole steps (forward, loss, backward, clip, AdamW) of TorchTitan's debugmodel with n = 1.

    The last column divides tokens a second by the rate of a square matrix product, in GFLOP/s, that
    the same process reached in the same dtype: what the machine is worth falls out. Parameters and
    optimizer are float32, products in `dtype`, as training.mixed_precision_param makes them;
    nothing is recomputed. On CPUs: one thread, CPU-seconds.

    Args:
        dtype: of the products, float32 or bfloat16.
        modes: eager, compiled (each block by torch.compile).
        layers: blocks.
        dim: width.
        n_heads: attention heads a block.
        vocab: size of the vocabulary.
        seq_len: tokens a sequence.
        batch_size: sequences a step.
        matmul: side of the square product.
        steps: timed steps; the fastest counts.
        warmup: steps before these (compilation).
        json: file for the figures.
        plot: PNG file for a bar chart.
    """
    sizes = {"layers": layers, "dim": dim, "n_heads": n_heads, "vocab": vocab}
    sizes |= {"seq_len": seq_len, "batch_size": batch_size}
    rows = [
        {"mode": mode, "dtype": dtype, "n": 1}
        | in_process(_speed_here, mode == "compiled", dtype, sizes, matmul, steps, warmup)
        for mode in modes
    ]
    report(rows, json, plot, bars=("s a step",))


def _speed_here(
    compiled: bool, dtype: str, sizes: dict[str, Any], matmul: int, steps: int, warmup: int
) -> dict[str, float]:
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    step = _prepare(compiled, dtype, sizes)

    def product() -> float:
        return matmul_flops_per_second(getattr(torch, dtype), matmul, repeats=3)

    for _ in range(warmup):
        step()
    rate, seconds = product(), []
    for _ in range(steps):
        start = clock()
        step()
        seconds.append(clock() - start)
    gigaflops = max(rate, product()) / 1e9  # other load only ever subtracts
    dist.destroy_process_group()
    tokens = sizes["batch_size"] * sizes["seq_len"] / min(seconds)
    return {
        "s a step": min(seconds),
        "tokens/s": tokens,
        f"GFLOP/s of {matmul}^3": gigaflops,
        "tokens/s per GFLOP/s": tokens / gigaflops,
    }


def _prepare(compiled: bool, dtype: str, sizes: dict[str, Any]) -> Callable[[], None]:
    """The model as the trainer builds it, on one rank, and its step."""
    config = JobConfig()
    config.activation_checkpoint.mode = "none"
    config.compile.enable = compiled
    world = init_world(config.parallelism)
    args = replace(
        flavors["llama3"]["debugmodel"],
        n_layers=sizes["layers"],
        dim=sizes["dim"],
        n_heads=sizes["n_heads"],
        vocab_size=sizes["vocab"],
        max_seq_len=sizes["seq_len"],
    )
    model = parallelize(build_model(args), config, world, getattr(torch, dtype), seed=0)
    optimizer = build_optimizer(model.parameters(), config.optimizer)
    batch = random_batch(sizes, 1, world.device)
    scales = torch.full((1,), 1 / batch.tokens.numel(), device=world.device)

    def step() -> None:
        ENGINES["joint"](model, batch, scales, LossOptions(), True)
        clip_gradients(model, config.training.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return step
