"""`benchmark.py overlap`: how long computation waits for FSDP2's communication, simulated."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.fake_gpu import Allocations, fake_gpu, put_on
from benchmarks.heads import CASES
from benchmarks.measure import in_process
from benchmarks.report import report
from benchmarks.streams import Rates, Wait, clock
from torchtitan_mtp.build import model_from_config
from torchtitan_mtp.config import JobConfig, parse_args
from torchtitan_mtp.data.targets import Batch
from torchtitan_mtp.distributed.memory import GIB
from torchtitan_mtp.distributed.mesh import Degrees, World
from torchtitan_mtp.distributed.parallelize import parallelize
from torchtitan_mtp.models.trunk import Trunk
from torchtitan_mtp.mtp import ENGINES
from torchtitan_mtp.trainer import loss_options


class Step(NamedTuple):
    """One micro-batch, from the first gather to the end of the last reduction."""

    seconds: float
    busy: float  # of these
    waits: list[Wait]  # the rest
    bytes: dict[str, int]  # gathered and reduced, of whole tensors
    peak: int  # bytes alive above those before

    @property
    def exposed(self) -> float:
        """Seconds for which computation waits."""
        return sum(wait.seconds for wait in self.waits)

    @property
    def within(self) -> float:
        """Those of them that come after the first 2% of the computation and before the last."""
        edge = 0.02 * self.busy
        return sum(w.seconds for w in self.waits if edge < w.busy < self.busy - edge)


def run(
    config: str = "mtp_8b.toml",
    cases: tuple[str, ...] = tuple(CASES)[:4],
    heads: tuple[int, ...] = (1, 4),
    reshard: tuple[str, ...] = ("default", "never"),
    links: tuple[float, ...] = (330, 50),
    ranks: int = 8,
    options: tuple[str, ...] = (),
    json: Path | None = None,
    plot: Path | None = None,
) -> None:
    """What of FSDP2's communication is not hidden behind computation, by a clock for every stream.

    The trainer's own model, engines and FSDP2 run on fake tensors; an operation takes the time that
    an H100's rates give it (`streams.py`). One micro-batch, without the optimizer. "exposed" is how
    long computation waits in all, "within" that part which is not at its first and last 2%.

    Args:
        config: recipe, by name or path.
        cases: heads and engine, as "parallel, joint".
        heads: values of n.
        reshard: values of parallelism.fsdp_reshard_after_forward.
        links: GB/s at which a collective's data leave and reach a GPU.
        ranks: GPUs of the run, which shard the model over all.
        options: keys to change, as section.key=value.
        json: file for the figures.
        plot: PNG file for a bar chart.
    """
    rows, names, steps = [], [], []
    chosen = dict.fromkeys(("plain model", 1) if n == 1 else (c, n) for n in heads for c in cases)
    for (case, n), kept in itertools.product(chosen, reshard):
        family, engine = CASES.get(case, ("parallel", "joint"))
        changes = [f"mtp.heads={family}", f"mtp.engine={engine}", f"mtp.num_future_tokens={n}"]
        names.append({"heads, engine": case, "n": n, "reshard": kept})
        if family != "parallel":
            changes.append("mtp.match_parameters=false")
        steps.append([*changes, f"parallelism.fsdp_reshard_after_forward={kept}", *options])
    for link in links:
        found = in_process(simulate, config, steps, ranks, Rates(link * 1e9))
        for name, step in zip(names, found, strict=True):
            rows.append({**name, "link GB/s": f"{link:g}", **_figures(step)})
    report(rows, json, plot, bars=("step ms", "exposed ms"))


def _figures(step: Step) -> dict[str, float]:
    return {
        "step ms": 1e3 * step.seconds,
        "exposed ms": 1e3 * step.exposed,
        "within ms": 1e3 * step.within,
        "gathered GiB": step.bytes["all-gather"] / GIB,
        "reduced GiB": step.bytes["reduce-scatter"] / GIB,
    }


def simulate(config: str, cases: Sequence[Sequence[str]], ranks: int, rates: Rates) -> list[Step]:
    """A micro-batch of a recipe for each of the changes to it. Once in a process."""
    jobs = []
    for changes in cases:
        changed = (f"--{change}" for change in (*changes, "compile.enable=false"))
        jobs.append(parse_args(["--job.config_file", config, *changed]))
    models = [model_from_config(job, 0, torch.float32) for job in jobs]
    with fake_gpu(Degrees(dp_shard=ranks)) as (world, allocations):
        return [_step(*pair, world, allocations, rates) for pair in zip(jobs, models, strict=True)]


def _step(
    job: JobConfig, model: Trunk, world: World, allocations: Allocations, rates: Rates
) -> Step:
    training, n = job.training, job.num_future_tokens

    def ids(*more: int) -> torch.Tensor:
        size = training.local_batch_size, training.seq_len, *more
        return torch.zeros(size, dtype=torch.int64, device=world.device)

    batch, scales = Batch(ids(), ids(n - 1), ids(n), ids(), ids()), ids().new_ones(n).float()
    put_on(model, world.device)
    model = parallelize(model, job, world, torch.bfloat16, seed=0)
    options, before = loss_options(job, model.softcap), allocations.alive
    allocations.begin()
    with clock(world, rates) as time:
        ENGINES[job.mtp.engine](model, batch, scales, options, True)
    compute, peak = time.compute, allocations.peak - before
    sizes = {kind: size for (_, kind), size in time.collectives.bytes.items()}
    return Step(compute.time, compute.busy, compute.waits, sizes, peak)
