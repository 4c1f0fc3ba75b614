"""`benchmark.py train`: tokens a second and MFU of a configuration, as the trainer runs it."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import in_process
from benchmarks.report import report
from torchtitan_mtp.config import parse_args
from torchtitan_mtp.models.flavors import flavors
from torchtitan_mtp.monitoring.device import MemoryMonitor, peak_flops
from torchtitan_mtp.monitoring.flops import forward_backward_flops_per_token
from torchtitan_mtp.trainer import Trainer


def run(
    config: Path = Path("train_configs/debug_parallel.toml"),
    options: tuple[str, ...] = (),
    layers: int | None = None,
    steps: int = 10,
    warmup: int = 3,
    json: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Whole steps of the trainer on this one device, data included.

    Args:
        config: a TOML file of train_configs/.
        options: its keys to change, as section.key=value.
        layers: depth, for a part of a model that is too large for one device.
        steps: timed steps; the median counts.
        warmup: steps before these (compilation).
        json: file for the figures.
        plot: PNG file for a bar chart.
    """
    arguments = ["--job.config_file", str(config)]
    for option in options:
        key, _, value = option.partition("=")
        arguments += [f"--{key}", value]
    row = {"what": str(config), **in_process(train, arguments, layers, steps, warmup)}
    report([row], json, plot, bars=("tokens/s", "peak GiB"))


@contextlib.contextmanager
def built_trainer(arguments: list[str], layers: int | None, steps: int) -> Iterator[Trainer]:
    """A trainer that has run no step and will run at most `steps`; `arguments` are those of
    torchtitan_mtp.train, `layers` the depth, where it is not the flavor's."""
    with tempfile.TemporaryDirectory() as folder:
        # Never logging: a line of the log begins the peak of memory anew.
        beyond = str(steps + 1)
        for key in ("training.steps", "metrics.log_freq"):
            arguments = [*arguments, f"--{key}", beyond]
        config = parse_args([*arguments, "--job.dump_folder", folder])
        config.lr_scheduler.warmup_steps = min(config.lr_scheduler.warmup_steps, steps)
        if layers is not None:
            family = flavors[config.model.name]
            family["shallow"] = replace(family[config.model.flavor], n_layers=layers)
            config.model.flavor = "shallow"
        trainer = Trainer(config)
        try:
            yield trainer
        finally:
            trainer.close()


def train(arguments: list[str], layers: int | None, steps: int, warmup: int) -> dict[str, Any]:
    """One row: the median of `steps` steps after those of `warmup`."""
    with built_trainer(arguments, layers, warmup + steps) as trainer:
        return _measure(trainer, steps, warmup)


def _measure(trainer: Trainer, steps: int, warmup: int) -> dict[str, Any]:
    config, device = trainer.config, trainer.device
    for _ in range(warmup):
        trainer.train_step()
    memory = MemoryMonitor(device)
    seconds = []
    for _ in range(steps):
        start, tokens = time.perf_counter(), trainer.state.tokens
        trainer.train_step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    rate = (trainer.state.tokens - tokens) / statistics.median(seconds)  # tokens a second
    flops = forward_backward_flops_per_token(trainer.model, config.training.seq_len)
    peak = peak_flops(device, trainer.param_dtype)
    float8 = ""
    if "quantize.linear.float8" in config.model.converters:
        float8 = config.quantize.linear.float8.recipe_name or "tensorwise"
    return {
        "layers": trainer.model.args.n_layers,
        "dim": trainer.model.args.dim,
        "n": trainer.n,
        "heads": config.mtp.heads,
        "engine": config.mtp.engine,
        "dtype": str(trainer.param_dtype).removeprefix("torch."),
        "float8": float8,
        "compile": config.compile.enable,
        "tokens/s": rate,
        "GFLOP/token": flops / 1e9,
        "MFU %": 100 * rate * flops / peak if peak else float("nan"),
        "peak GiB": memory.peak()["memory/max_active(GiB)"],
    }
