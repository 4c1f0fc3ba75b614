"""Sequences on two gloo ranks: what the ranks exchange, and whole trainings against one process.

Losses and gradients of every family: test_gradients.py. The ranks are started once, run everything,
and the tests look at what came of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from runs import DEEPSEEK, SEQUENTIAL, Run, config_of, train, validation, write_corpus
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

SPREAD = {"parallelism.context_parallel_degree": 2}
STEPS = {"training.steps": 10, "mtp.target": "trunk"}
SAVES = {
    "checkpoint.enable": True,
    "checkpoint.interval": 5,
    "checkpoint.last_save_model_only": False,
}
EAGER = {"compile.enable": False}
RUNS: dict[str, dict[str, Any]] = {
    "parallel": {"activation_checkpoint.mode": "selective", **SAVES, **STEPS},
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
    counts: Counter[str] = Counter()
    originals = {
        name: getattr(context_parallel, name) for name in ("_all_gather", "_reduce_scatter")
    }
    for name, collective in originals.items():

        def counted(x: Tensor, *args: Any, name=name, collective=collective) -> Tensor:
            counts[name + ("" if x.is_floating_point() else " of positions")] += 1
            return collective(x, *args)

        setattr(context_parallel, name, counted)
    ENGINES[mtp.engine](model, batch, torch.ones(n), LossOptions(), True)
    for name, collective in originals.items():
        setattr(context_parallel, name, collective)
    return counts


COUNTED = {  # ([mtp], activation checkpointing) by name
    "plain": (MTP(num_future_tokens=1), "none"),
    "parallel 2": (MTP(num_future_tokens=2), "none"),
    "parallel 6": (MTP(num_future_tokens=6), "none"),
    "parallel 6, joint": (MTP(num_future_tokens=6, engine="joint"), "none"),
    "chain 6": (MTP(num_future_tokens=6, heads="sequential"), "none"),
    "medusa 6": (MTP(num_future_tokens=6, heads="medusa"), "none"),
    "plain, checkpointed": (MTP(num_future_tokens=1), "full"),
}


def everything(rank: int, folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {"exchanged": exchanged(rank)}
    results["counts"] = {name: collectives(*case) for name, case in COUNTED.items()}
    for name, keys in RUNS.items():
        at = {"job.dump_folder": str(folder / name)}
        more = validation(folder, 10) if name == "parallel" else {}
        results[name] = train(config_of(folder, SPREAD, keys, more, at))
    at = {"job.dump_folder": str(folder / "resumed")}
    results["resumed"] = train(config_of(folder, SPREAD, RUNS["parallel"], at))
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("context")
    write_corpus(path, "jsonl")
    write_corpus(path / "held_out", "jsonl", count=9, seed=9)
    return path


@pytest.fixture(scope="module")
def alone(folder) -> Run:
    """One process, which saves what the ranks go on from."""
    at = {"job.dump_folder": str(folder / "alone")}
    run = train(config_of(folder, RUNS["parallel"], validation(folder, 10), at))
    step = "checkpoint/step-5"
    shutil.copytree(folder / "alone" / step, folder / "resumed" / step)
    return run


@pytest.fixture(scope="module")
def ranks(folder, alone) -> list[dict[str, Any]]:
    return run_ranks(2, everything, folder, timeout=240)


def assert_close(found: list[list[float]], expected: list[list[float]]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


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
    blocks = {name: 3 + mtp.num_future_tokens - 1 for name, (mtp, _) in COUNTED.items()}
    again = {name: 0 for name in COUNTED}
    again |= {"plain, checkpointed": 3, "chain 6": 5, "parallel 6, joint": 5}
    blocks["medusa 6"] = 3
    for name, found in ranks[0]["counts"].items():
        gathers = blocks[name] + again[name]
        expected = {"_all_gather": gathers, "_reduce_scatter": blocks[name]}
        assert found == {**expected, "_all_gather of positions": 2}, name


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_train_as_one_process(name, ranks, alone, folder):
    """With checkpointed blocks, targets from the trunk and validation; accumulation, compiled
    blocks and z-loss; experts with a balance loss of sequences."""
    expected = alone if name == "parallel" else train(config_of(folder, RUNS[name], EAGER))
    first, second = (results[name] for results in ranks)
    assert first.losses == second.losses
    assert_close(first.losses, expected.losses)
    assert_close(
        [[step["grad_norm"] for step in first.logged]], [[s["grad_norm"] for s in expected.logged]]
    )
    assert [s["n_tokens_seen"] for s in first.logged] == [
        s["n_tokens_seen"] for s in expected.logged
    ]
    assert_close(first.validated, expected.validated)
    for found, single in zip(first.acceptance, expected.acceptance, strict=True):
        assert found.drafted == single.drafted and min(found.drafted) > 100
        torch.testing.assert_close(found.agreed, single.agreed, rtol=0, atol=2)  # ties


def test_checkpoints_go_from_one_layout_to_the_other(ranks, alone, folder):
    """Five steps more: one process from what two ranks saved, and the reverse."""
    resumed = ranks[0]["resumed"]
    assert resumed.start == 5
    assert_close(resumed.losses, alone.losses[5:])
    step = "checkpoint/step-5"
    shutil.copytree(folder / "parallel" / step, folder / "back" / step)
    back = train(config_of(folder, RUNS["parallel"], {"job.dump_folder": str(folder / "back")}))
    assert back.start == 5
    assert_close(back.losses, ranks[0]["parallel"].losses[5:])


def low_precision(rank: int, folder: Path, keys: dict[str, Any]) -> Run:
    return train(config_of(folder, SPREAD, keys))


@pytest.mark.exhaustive
@pytest.mark.parametrize("converters", [["mtp"], ["mtp", "quantize.linear.float8"]])
def test_bfloat16_and_float8_stay_close(converters, folder):
    """Their scales are of a rank's own tokens."""
    keys = {"model.converters": converters, "training.mixed_precision_param": "bfloat16"}
    keys |= {"training.steps": 3, "job.dump_folder": str(folder / f"low {len(converters)}")}
    found, _ = run_ranks(2, low_precision, folder, keys)
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
