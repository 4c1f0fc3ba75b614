"""`benchmark.py memory`: what a recipe has alive on one GPU at its worst, counted without a GPU."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch

from benchmarks.fake_gpu import Allocations, fake_gpu, put_on
from benchmarks.heads import CASES
from benchmarks.measure import in_process
from benchmarks.report import report
from torchtitan_mtp.build import model_from_config
from torchtitan_mtp.config import JobConfig, parse_args
from torchtitan_mtp.data.run import micro_batches_per_step
from torchtitan_mtp.data.targets import Batch
from torchtitan_mtp.data.tokenizer import build_tokenizer
from torchtitan_mtp.distributed.memory import GIB
from torchtitan_mtp.distributed.mesh import World, mesh_degrees
from torchtitan_mtp.distributed.parallelize import parallelize
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.trunk import Trunk
from torchtitan_mtp.mtp import ENGINES
from torchtitan_mtp.optimizer import build_optimizer, clip_gradients
from torchtitan_mtp.trainer import loss_options


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
        count = count or micro_batches_per_step(config, ranks)
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
    """That of the recipe with these changes. Error: one that fake tensors can't follow."""
    arguments = ["--job.config_file", recipe]
    for key, _, value in (change.partition("=") for change in changes):
        arguments += [f"--{key}", value]
    config = parse_args(arguments)
    config.compile.enable = False
    for found, name in (
        (config.model.name == "hf", 'model.name = "hf"'),
        ("quantize.linear.float8" in config.model.converters, "float8"),
        (config.parallelism.context_parallel_degree > 1, "context parallelism"),
        (config.training.enable_cpu_offload, "training.enable_cpu_offload"),
    ):
        if found:
            raise UserError(f"benchmark memory: {name} is not counted yet; leave it out")
    return config


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
    """What one of the ranks has alive at the peak of a step after the first, by what it is. Once in
    a process."""
    training, assets = config.training, config.model.hf_assets_path
    vocabulary = build_tokenizer(assets).vocab_size if assets == "byte" else 0
    model = model_from_config(config, vocabulary, getattr(torch, training.dtype))
    with fake_gpu(mesh_degrees(config.parallelism, ranks)) as (world, allocations):
        put_on(model, world.device)
        return _step(config, model, world, allocations, micro_batches)


def _step(
    config: JobConfig, model: Trunk, world: World, allocations: Allocations, count: int
) -> dict[str, int]:
    training, n, device = config.training, config.num_future_tokens, world.device
    model = parallelize(model, config, world, _compute_dtype(config), seed=0)
    optimizer = build_optimizer(model.parameters(), config.optimizer)
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.zeros_like(param)
    optimizer.step()  # the moments are there from the first step on
    optimizer.zero_grad()
    del param
    parameters = allocations.of([*model.parameters(), *model.buffers()])
    moments = allocations.of(t for state in optimizer.state.values() for t in state.values())
    engine, options = ENGINES[config.mtp.engine], loss_options(config, model.softcap)
    scales, gradients = torch.ones(n, device=device), set()
    before = set(allocations.storages.values())
    allocations.begin()
    for i in range(count):
        batch = _batch(training.local_batch_size, training.seq_len, n, device)
        reduce = training.reduce_every_micro_batch or i == count - 1
        engine(model, batch, scales, options, reduce)
        del batch
        gradients |= set(allocations.storages.values()) - before
    clip_gradients(model, training.max_norm)
    optimizer.step()
    found = {
        "parameters": allocations.at_peak(parameters),
        "gradients": allocations.at_peak(gradients),
        "moments": allocations.at_peak(moments),
    }
    rest = allocations.peak - sum(found.values())
    return found | {"activations": rest, "total": allocations.peak}


def _compute_dtype(config: JobConfig) -> torch.dtype:
    name = config.training.mixed_precision_param
    return torch.bfloat16 if name == "auto" else getattr(torch, name)


def _batch(size: int, seq_len: int, n: int, device: torch.device) -> Batch:
    def ids(*more: int) -> torch.Tensor:
        return torch.zeros(size, seq_len, *more, dtype=torch.int64, device=device)

    return Batch(ids(), ids(n - 1), ids(n), ids(), ids())
