"""What a recipe takes on any number of GPUs, none of which is needed: memory, collectives, time."""

from __future__ import annotations

import copy
import itertools
import json as json_format
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tyro
from benchmarks.devices import Device, device_named, peak_of, rates_of
from benchmarks.fake_gpu import NAME
from benchmarks.step import KINDS, Step, data_ranks, model_on_meta, run_layout
from benchmarks.streams import Rates
from rich.console import Console
from rich.table import Table

from torchtitan_mtp.build import model_args_from_config
from torchtitan_mtp.config import JobConfig, parse_args
from torchtitan_mtp.config.checks import check
from torchtitan_mtp.data.run import micro_batches_per_step
from torchtitan_mtp.distributed.memory import GIB
from torchtitan_mtp.distributed.mesh import Degrees, mesh_degrees
from torchtitan_mtp.errors import UserError, writing
from torchtitan_mtp.monitoring.flops import forward_backward_flops_per_token
from torchtitan_mtp.writing import check_writable, written_whole

ROOM = 0.85  # of a device's memory, for what the allocator rounds up, kernels and NCCL
_KEYS = {
    "dp_replicate": "data_parallel_replicate_degree",
    "cp": "context_parallel_degree",
    "tp": "tensor_parallel_degree",
    "ep": "expert_parallel_degree",
}


def run(
    config: tyro.conf.Positional[str],
    ranks: int = 8,
    device: str = "h100",
    memory: float | None = None,
    flops: float | None = None,
    within: float | None = None,
    between: float | None = None,
    machine: int = 8,
    options: tuple[str, ...] = (),
    layouts: bool = False,
    most: int = 16,
    json: Path | None = None,
) -> None:
    """What a step of a recipe takes on each of any number of ranks, none of which is needed.

    The trainer's own step runs on fake tensors as one rank of a fake process group. Nothing is
    compiled; what is counted and what is not: docs/scaling.md.

    Args:
        config: recipe, by name or path.
        ranks: GPUs of the run.
        device: a100, h100, h200 or b200; or cpu, which has no times.
        memory: GiB of one; by default the device's.
        flops: TFLOP/s of one in bfloat16, dense; by default the data sheet's.
        within: GB/s from a GPU to others of its machine; by default the data sheet's.
        between: GB/s from a GPU to others of other machines; by default its network card's.
        machine: GPUs of one machine.
        options: keys to change, as section.key=value.
        layouts: a table of layouts in place of the recipe's one, the fastest that fits first.
        most: rows of that table.
        json: file for the figures.
    """
    sizes = {"ranks": ranks, "machine": machine, "most": most, "memory": memory}
    for key, value in {**sizes, "flops": flops, "within": within, "between": between}.items():
        if value is not None and value <= 0:
            raise UserError(f"--{key} {value}: expected a positive number")
    if json is not None:
        check_writable(json, f"--json {json}")
    arguments = [f"--{option}" for option in options]
    job = parse_args(["--job.config_file", config, *arguments])
    chosen, rates, peak = _device(device, memory, flops, within, between, machine)
    console = Console(width=100, highlight=False)
    if layouts:
        rows = try_layouts(job, ranks, rates, chosen, most, machine)
        console.print(_table(f"{config} on {ranks} of {device}", rows))
        found: Any = {"layouts": rows}
    else:
        step = run_layout(job, ranks, NAME if rates else "cpu", rates)
        found = figures(job, ranks, step, chosen, peak)
        for title, rows in found.items():
            console.print(_table(title, rows))
    if json is not None:
        about = {"command": "python " + " ".join(sys.argv), "torch": torch.__version__}
        with writing(f"--json {json}"), written_whole(json) as file:
            file.write_text(json_format.dumps(about | found, indent=1) + "\n")


def _device(
    name: str,
    memory: float | None,
    flops: float | None,
    within: float | None,
    between: float | None,
    machine: int,
) -> tuple[Device | None, Rates | None, float]:
    """The device with what is given in its place, its rates, and its FLOP/s; of a CPU none."""
    if name == "cpu":
        return None, None, 0.0
    given = {"memory": memory, "within": within, "between": between}
    chosen = replace(device_named(name), **{k: v for k, v in given.items() if v is not None})
    peak = flops * 1e12 if flops else peak_of(name)
    return chosen, rates_of(chosen, peak, machine), peak


def figures(
    config: JobConfig, ranks: int, step: Step, device: Device | None, peak: float
) -> dict[str, list[dict[str, Any]]]:
    """The tables of one layout."""
    alive = step.peak
    memory: list[dict[str, Any]] = [
        {"alive at the peak": kind, "GiB": alive[kind] / GIB} for kind in KINDS
    ]
    memory.append({"alive at the peak": "all", "GiB": alive.total() / GIB})
    if device is not None:
        memory.append({"alive at the peak": "a device has", "GiB": device.memory})
    collectives = [
        {
            "dimension": dimension,
            "collective": kind,
            "calls": step.calls[dimension, kind],
            "GiB": step.bytes[dimension, kind] / GIB,
            "waited for, ms": 1e3 * step.waits[dimension, kind],
        }
        for dimension, kind in step.calls
    ]
    found = {"memory of a rank": memory, "collectives of a step": collectives}
    if step.stages:
        found["ranks of the pipeline"] = [_rank(*item) for item in step.stages.items()]
    return found | {"time of a step": _time(config, ranks, step, peak)} if peak else found


def _rank(rank: int, step: Step) -> dict[str, Any]:
    """A row of one rank of a pipeline."""
    return {
        "rank": rank,
        "GiB": step.peak.total() / GIB,
        "ms of a micro-batch on a stage": 1e3 * step.micro_batch,
        "ms without bubble": 1e3 * step.seconds,
    }


def _time(config: JobConfig, ranks: int, step: Step, peak: float) -> list[dict[str, Any]]:
    tokens, needed = _work(config, ranks)
    return [
        {"of a rank": "tokens", "": float(tokens)},
        {"of a rank": "TFLOPs that the model needs", "": needed / 1e12},
        {"of a rank": "TFLOPs that run", "": step.flops / 1e12},
        {"of a rank": "step, ms", "": 1e3 * step.seconds},
        {"of a rank": "of it waiting for collectives, ms", "": 1e3 * step.waits.total()},
        {"of a rank": "of it the pipeline's bubble, ms", "": 1e3 * step.bubble},
        {"of a rank": "tokens/s", "": tokens / step.seconds},
        {"of a rank": "MFU, %", "": 100 * needed / step.seconds / peak},
    ]


def _work(config: JobConfig, ranks: int) -> tuple[int, float]:
    """Tokens of a step and the FLOPs that they need, a rank."""
    training, data = config.training, data_ranks(config, ranks)
    micro = micro_batches_per_step(config, data)
    tokens = micro * training.local_batch_size * training.seq_len * data
    model = model_on_meta(config)
    each = forward_backward_flops_per_token(model, training.seq_len, config.target_loss is not None)
    return tokens // ranks, tokens * each / ranks


def try_layouts(
    config: JobConfig,
    ranks: int,
    rates: Rates | None,
    device: Device | None,
    most: int,
    machine: int = 8,
) -> list[dict[str, Any]]:
    """A row for each of the first `most` layouts, two at a time; the fastest that fits first."""
    if rates is None or device is None:
        raise UserError("--layouts: times are of GPUs; take another --device than cpu")

    def row(layout: tuple[JobConfig, Degrees]) -> dict[str, Any]:
        job, degrees = layout
        try:
            step = run_layout(job, ranks, NAME, rates)
        except UserError:
            if degrees == Degrees(pp=degrees.pp, dp_shard=ranks // degrees.pp):
                raise  # it is not the layout
            return {}  # the model's sizes do not admit it
        gib = step.peak.total() / GIB
        return {
            "layout": " ".join(f"{k}={v}" for k, v in degrees._asdict().items() if v > 1),
            "fits": gib <= ROOM * device.memory,
            "GiB": gib,
            "step ms": 1e3 * step.seconds,
            "waiting ms": 1e3 * step.waits.total(),
            "tokens/s a rank": _work(job, ranks)[0] / step.seconds,
        }

    layouts, rows = possible_layouts(config, ranks, machine), list[dict[str, Any]]()
    with ThreadPoolExecutor(2) as pool:
        while batch := list(itertools.islice(layouts, most - len(rows))):
            rows += filter(None, pool.map(row, batch))
    if not rows:
        raise UserError(f"--layouts: no layout of {ranks} ranks passes; run without it to see why")
    return sorted(rows, key=lambda r: (not r["fits"], -r["tokens/s a rank"]))


def possible_layouts(
    config: JobConfig, ranks: int, machine: int = 8
) -> Iterator[tuple[JobConfig, Degrees]]:
    """Powers of two of every dimension that the configuration's checks admit, few dimensions
    first; the shards are what is left. Tensor parallelism stays within a machine, as it waits for
    its collectives, and there are no more ranks to share the experts than experts."""
    powers = [2**k for k in range(ranks.bit_length()) if ranks % 2**k == 0]
    moe = model_args_from_config(config, 0).moe
    limits = {"tp": machine, "ep": moe.num_experts if moe else 1}
    each = ([p for p in powers if p <= limits.get(name, ranks)] for name in _KEYS)
    combinations = itertools.product(*each)
    for degrees in sorted(combinations, key=lambda ds: (sum(d > 1 for d in ds), max(ds), ds)):
        job = copy.deepcopy(config)
        job.parallelism.data_parallel_shard_degree = -1
        for key, degree in zip(_KEYS.values(), degrees, strict=True):
            setattr(job.parallelism, key, degree)
        try:
            check(job)
            found = mesh_degrees(job.parallelism, ranks)
            micro_batches_per_step(job, data_ranks(job, ranks))
        except UserError:
            continue
        yield job, found


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, key in enumerate(rows[0] if rows else ()):
        table.add_column(key, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return (
            f"{value:,.0f}" if value >= 1000 else f"{value:.2f}" if value < 100 else f"{value:.1f}"
        )
    return str(value)


def main() -> None:
    warnings.simplefilter("ignore")
    try:
        tyro.cli(run)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
