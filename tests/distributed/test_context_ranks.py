"""Sequences on two gloo ranks: what the ranks exchange, and whole trainings against one process.

Losses and gradients of every family: test_gradients.py. The ranks are started once, run everything,
and the tests look at what came of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from runs import DEEPSEEK, SEQUENTIAL, Run, config_of, train
from spawn import ROOT, run_ranks
from tests.small import small_model, small_window
from torchtitan_mtp.cli.plot_run import read_scalars
from torchtitan_mtp.config import MTP, ActivationCheckpoint
from torchtitan_mtp.data.targets import make_batch
from torchtitan_mtp.distributed.activation_checkpoint import apply_activation_checkpointing
from torchtitan_mtp.models import context_parallel
from torchtitan_mtp.models.context_parallel import ContextParallel
from torchtitan_mtp.mtp import ENGINES
from torchtitan_mtp.ops import LossOptions
from two_ranks import (
    HALFWAY,
    STEPS,
    Trainings,
    assert_trained_alike,
    blocks,
    counted,
    train_on_rank,
)

RUNS: dict[str, dict[str, Any]] = {
    "parallel": {**HALFWAY, "activation_checkpoint.mode": "selective", "mtp.target": "trunk"},
    "chain": {
        **SEQUENTIAL,
        "training.steps": 2,
        "training.local_batch_size": 1,
        "training.global_batch_size": 2,
        "compile.enable": True,
        "compile.components": ["model"],
        "compile.backend": "aot_eager",
        "loss.z_loss": 1e-3,
    },
    "experts": {**DEEPSEEK, "training.steps": 2, "model.args.moe.aux_loss_coeff": 0.5},
}
TRAININGS = Trainings(RUNS, of_ranks={"parallelism.context_parallel_degree": 2})


def exchanged(rank: int) -> dict[str, Tensor]:
    """Sequence [0, .., 7] on two ranks, rank 0 with 0 1 6 7: what each function gives."""
    ranks = ContextParallel(dist.group.WORLD)
    own = torch.tensor([[[0, 1, 6, 7], [2, 3, 4, 5]][rank]]).float()  # [1, 4]
    x = own.clone().requires_grad_()
    gathered = ranks.gather(x)
    (gathered * torch.arange(8) * (rank + 1)).sum().backward()
    k, v = ranks.gather_kv(
        own[..., None, None].expand(1, 4, 2, 3), own[:, :, None, None].expand(1, 4, 2, 1)
    )
    return {
        "gather": gathered.detach(),
        "gradient": x.grad,
        "k": k,
        "v": v,
        "whole": ranks.whole(own),
        "with_following": ranks.with_following(own[..., None], 2)[..., 0],
        "sum": ranks.sum(own),
    }


def collectives(mtp: MTP, ac: str) -> Counter[str]:
    """Gathers of the ranks' parts, and scatters of gradients, by what asked for them in a step."""
    model = small_model(mtp, n_layers=3)
    model.context_parallel = ContextParallel(dist.group.WORLD)
    apply_activation_checkpointing(model, ActivationCheckpoint(mode=ac), mtp.engine)
    n = mtp.num_future_tokens
    batch = model.context_parallel.shard(make_batch(small_window(2, 12 + n), n))

    def kind(name: str) -> Callable[..., str]:
        return lambda x, *_: name + ("" if x.is_floating_point() else " of positions")

    with (
        counted(context_parallel, "_all_gather", what=kind("gathers")) as gathers,
        counted(context_parallel, "_reduce_scatter", what=kind("scatters")) as scatters,
    ):
        ENGINES[mtp.engine](model, batch, torch.ones(n), LossOptions(), True)
    return gathers + scatters


def everything(rank: int, folder: Path) -> dict[str, Any]:
    counts = {name: collectives(*step) for name, step in STEPS.items()}
    return {"exchanged": exchanged(rank), "counts": counts, **TRAININGS.on_ranks(folder)}


@pytest.fixture(scope="module")
def alone(folder) -> Run:
    return TRAININGS.alone(folder)


@pytest.fixture(scope="module")
def ranks(folder, alone) -> list[dict[str, Any]]:
    return run_ranks(2, everything, folder, timeout=240)


def test_what_ranks_exchange(ranks):
    first, second = (results["exchanged"] for results in ranks)
    for here in (first, second):
        assert here["gather"].tolist() == [[0, 1, 6, 7, 2, 3, 4, 5]]
        assert here["whole"].tolist() == [[*range(8)]]
        assert here["k"].shape == (1, 8, 2, 3) and here["v"].shape == (1, 8, 2, 1)
        assert here["k"][0, :, 1, 2].tolist() == here["v"][0, :, 0, 0].tolist()
        assert here["sum"].tolist() == [[2, 4, 10, 12]]
    assert [g["gradient"].tolist() for g in (first, second)] == [[[0, 3, 6, 9]], [[12, 15, 18, 21]]]
    assert first["with_following"].tolist() == [[[0, 1, 2, 3], [6, 7, 0, 0]]]
    assert second["with_following"].tolist() == [[[2, 3, 4, 5], [4, 5, 6, 7]]]


def test_heads_add_only_their_own_collectives(ranks):
    """A block gathers once and scatters once, and gathers anew where it is computed anew; positions
    and documents go round once, whatever the heads."""
    for name, found in ranks[0]["counts"].items():
        once, again = blocks(name, layers=3)
        expected = {"gathers": once + again, "scatters": once, "gathers of positions": 2}
        assert found == expected, name


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_train_as_one_process(name, ranks, alone, folder):
    """With checkpointed blocks, targets from the trunk and validation; accumulation, compiled
    blocks and z-loss; experts with a balance loss of sequences."""
    expected = alone if name == "parallel" else TRAININGS.run(folder, name, "alone")
    assert_trained_alike([results[name] for results in ranks], expected)


def test_checkpoints_go_from_one_layout_to_the_other(ranks, alone, folder):
    """Two steps more: one process from what two ranks saved, and the reverse."""
    TRAININGS.assert_go_on(folder, alone, ranks[0]["parallel"], ranks[0]["resumed"])


@pytest.mark.exhaustive
@pytest.mark.parametrize("converters", [["mtp"], ["mtp", "quantize.linear.float8"]])
def test_bfloat16_and_float8_stay_close(converters, folder):
    """Their scales are of a rank's own tokens."""
    keys = {"model.converters": converters, "training.mixed_precision_param": "bfloat16"}
    keys |= {"training.steps": 3, "job.dump_folder": str(folder / f"low {len(converters)}")}
    found, _ = run_ranks(2, train_on_rank, folder, TRAININGS.of_ranks, keys)
    expected = train(config_of(folder, keys))
    torch.testing.assert_close(found.losses, expected.losses, rtol=0.02, atol=0)


@pytest.mark.exhaustive
def test_a_recipe_under_torchrun(tmp_path):
    """debug_parallel.toml: ten steps, as the command line has them."""
    torchrun = "torch.distributed.run --nproc_per_node 2 --rdzv_backend c10d --rdzv_endpoint"
    runs = {"one": ("torchtitan_mtp.train", "1")}
    runs["two"] = (f"{torchrun} localhost:0 -m torchtitan_mtp.train", "2")
    environment = {name: v for name, v in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    scalars = []
    for name, (program, degree) in runs.items():
        keys = f"--job.config_file debug_parallel.toml --job.dump_folder {tmp_path / name}"
        keys += f" --parallelism.context_parallel_degree {degree} --metrics.enable_tensorboard"
        keys += " --training.mixed_precision_param float32"
        command = [sys.executable, "-m", *program.split(), *keys.split()]
        subprocess.run(command, env=environment, check=True, timeout=300)
        scalars.append(read_scalars(tmp_path / name))
    for k in range(1, 5):
        (expected, found) = (one[f"loss_metrics/mtp_head_{k}_loss"] for one in scalars)
        assert len(expected) == 10
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
