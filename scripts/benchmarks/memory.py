"""`benchmark.py memory`: what a recipe has alive on one GPU at its worst, counted without a GPU."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from benchmarks.heads import CASES
from benchmarks.measure import in_process
from benchmarks.report import report
from benchmarks.step import data_ranks, run_step
from torchtitan_mtp.config import JobConfig, parse_args
from torchtitan_mtp.data.run import micro_batches_per_step
from torchtitan_mtp.distributed.memory import GIB


def run(
    configs: tuple[str, ...] = ("mtp_8b.toml",),
    ranks: int = 8,
    options: tuple[str, ...] = (),
    cases: tuple[str, ...] = (),
    heads: tuple[int, ...] = (),
    micro_batches: tuple[int, ...] = (),
    ac: tuple[str, ...] = (),
    json: Path | None = None,
) -> None:
    """Peak memory of recipes on one of many GPUs, in GiB, from whole steps on fake tensors.

    A row for every combination of what is given below; what is not given is as the recipe says.
    Gradients are those that outlive their micro-batch. Activations are all the rest that is alive
    at the peak: gathered parameters, buffers of collectives and the loss's chunk, too. Nothing is
    compiled, and nothing counted that is not a tensor: what the allocator rounds up or cannot
    reuse, NCCL's buffers, a checkpoint under way.

    Args:
        configs: recipes, by name or path.
        ranks: GPUs of the run.
        options: keys to change, as section.key=value.
        cases: heads and engine, as "parallel, joint", "parallel, head by head", "chain", "medusa".
        heads: values of n.
        micro_batches: how many of them a step has.
        ac: activation checkpointing: none, op, full, or every so-many-th block.
        json: file for the figures.
    """
    variants = dict.fromkeys(
        ("plain", 1) if n == 1 else (case, n) for n in heads or (0,) for case in cases or ("",)
    )
    rows = []
    for name, mode, count, (case, n) in itertools.product(
        configs, ac or ("",), micro_batches or (0,), variants
    ):
        changes = _changes(case, n, mode) + list(options)
        config = _configuration(name, changes)
        count = count or micro_batches_per_step(config, data_ranks(config, ranks))
        found = in_process(bytes_at_peak, config, ranks, count)
        gib = {key: f"{size / GIB:.2f}" for key, size in found.items()}
        rows.append(_settings(config) | {"micro-batches": count, "GPUs": ranks} | gib)
    report(rows, json, None, ())


def _changes(case: str, n: int, mode: str) -> list[str]:
    """The options of a row, as section.key=value."""
    changes = [f"mtp.num_future_tokens={n}"] * bool(n)
    if case in CASES:
        family, engine = CASES[case]
        changes += [f"mtp.heads={family}", f"mtp.engine={engine}"]
    if mode:
        selective = mode not in ("none", "full")
        changes.append(f"activation_checkpoint.mode={'selective' if selective else mode}")
        changes += [f"activation_checkpoint.selective_ac_option={mode}"] * selective
    return changes


def _configuration(recipe: str, changes: list[str]) -> JobConfig:
    """That of the recipe with these changes."""
    arguments = ["--job.config_file", recipe]
    for key, _, value in (change.partition("=") for change in changes):
        arguments += [f"--{key}", value]
    return parse_args(arguments)


def _settings(config: JobConfig) -> dict[str, Any]:
    """What tells a row from the others."""
    n, ac = config.num_future_tokens, config.activation_checkpoint
    return {
        "recipe": Path(config.job.config_file or "").stem,
        "heads, engine": "none" if n == 1 else f"{config.mtp.heads}, {config.mtp.engine}",
        "n": n,
        "AC": ac.selective_ac_option if ac.mode == "selective" else ac.mode,
    }


def bytes_at_peak(config: JobConfig, ranks: int, micro_batches: int) -> dict[str, int]:
    """What one of the ranks (of a pipeline, of its first stage) has alive at the peak of a step
    after the first, by what it is."""
    peak = run_step(config, ranks, micro_batches=micro_batches).peak
    found = {kind: peak[kind] for kind in ("parameters", "gradients", "moments")}
    return found | {"activations": peak.total() - sum(found.values()), "total": peak.total()}
