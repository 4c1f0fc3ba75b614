"""The same tokens on two gloo ranks: what the ranks exchange, and whole trainings against one
process.

Losses and gradients of every family: test_gradients.py. The ranks are started once, run everything,
and the tests look at what came of it.
"""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from runs import Run, config_of, train, validation, write_corpus
from spawn import run_ranks
from test_context_ranks import EAGER, RUNS, assert_close
from tests.small import ARGS, small_window
from torchtitan_mtp.config import MTP, JobConfig
from torchtitan_mtp.data.targets import make_batch
from torchtitan_mtp.distributed.mesh import init_world
from torchtitan_mtp.distributed.parallelize import parallelize
from torchtitan_mtp.models import context_parallel
from torchtitan_mtp.models.transformer import build_model
from torchtitan_mtp.mtp import ENGINES, add_heads
from torchtitan_mtp.ops import LossOptions

WIDE = {"model.vocab_size": 264}  # the byte tokenizer's, and some that ranks can share
SPREAD = {"parallelism.tensor_parallel_degree": 2}


def collectives(mtp: MTP, ac: str) -> Counter[str]:
    """Gathers and scatters of positions in a step's forward and backward."""
    config = JobConfig()
    config.mtp, config.activation_checkpoint.mode = mtp, ac
    config.parallelism.tensor_parallel_degree = 2
    model = add_heads(build_model(replace(ARGS, vocab_size=30)), mtp)
    model = parallelize(model, config, init_world(config.parallelism), torch.float32, seed=0)
    n = mtp.num_future_tokens
    batch = make_batch(small_window(2, 12 + n), n)
    counts: Counter[str] = Counter()
    originals = {
        name: getattr(context_parallel, name) for name in ("_all_gather", "_reduce_scatter")
    }
    for name, collective in originals.items():

        def counted(x: Tensor, *args: Any, name=name, collective=collective) -> Tensor:
            counts[name] += 1
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
    results: dict[str, Any] = {"counts": {n: collectives(*case) for n, case in COUNTED.items()}}
    for name, keys in RUNS.items():
        at = {"job.dump_folder": str(folder / name)}
        more = validation(folder, 10) if name == "parallel" else {}
        results[name] = train(config_of(folder, WIDE, SPREAD, keys, more, at))
    at = {"job.dump_folder": str(folder / "resumed")}
    results["resumed"] = train(config_of(folder, WIDE, SPREAD, RUNS["parallel"], at))
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tensor")
    write_corpus(path, "jsonl")
    write_corpus(path / "held_out", "jsonl", count=9, seed=9)
    return path


@pytest.fixture(scope="module")
def alone(folder) -> Run:
    """One process, which saves what the ranks go on from."""
    at = {"job.dump_folder": str(folder / "alone")}
    run = train(config_of(folder, WIDE, RUNS["parallel"], validation(folder, 10), at))
    step = "checkpoint/step-5"
    shutil.copytree(folder / "alone" / step, folder / "resumed" / step)
    return run


@pytest.fixture(scope="module")
def ranks(folder, alone) -> list[dict[str, Any]]:
    return run_ranks(2, everything, folder, timeout=400)


def test_heads_add_only_their_own_collectives(ranks):
    """A block gathers twice, for attention and feed-forward, and scatters what comes out; a loss
    gathers once; the embedding scatters once. Backwards do the reverse, and a block that is
    computed anew does it all anew."""
    blocks = {name: 3 + mtp.num_future_tokens - 1 for name, (mtp, _) in COUNTED.items()}
    again = {name: 0 for name in COUNTED}
    again |= {"plain, checkpointed": 3, "chain 6": 5, "parallel 6, joint": 5}
    blocks["medusa 6"] = 3
    for name, found in ranks[0]["counts"].items():
        each = 4 * blocks[name] + 2 * again[name] + COUNTED[name][0].num_future_tokens + 1
        assert found == {"_all_gather": each, "_reduce_scatter": each}, name


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_train_as_one_process(name, ranks, alone, folder):
    """With checkpointed blocks, targets from the trunk and validation; accumulation, compiled
    blocks and z-loss; experts with a balance loss of sequences."""
    expected = alone if name == "parallel" else train(config_of(folder, WIDE, RUNS[name], EAGER))
    first, second = (results[name] for results in ranks)
    assert first.losses == second.losses
    assert_close(first.losses, expected.losses)
    assert_close(
        [[step["grad_norm"] for step in first.logged]], [[s["grad_norm"] for s in expected.logged]]
    )
    for key in ("n_tokens_seen", "extra_metrics"):
        assert [s[key] for s in first.logged] == [s[key] for s in expected.logged]
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
    at = {"job.dump_folder": str(folder / "back")}
    back = train(config_of(folder, WIDE, RUNS["parallel"], at))
    assert back.start == 5
    assert_close(back.losses, ranks[0]["parallel"].losses[5:])


def low_precision(rank: int, folder: Path, keys: dict[str, Any]) -> Run:
    return train(config_of(folder, WIDE, SPREAD, keys))


@pytest.mark.exhaustive
@pytest.mark.parametrize("gather", [None, False, True])
def test_bfloat16_and_float8_stay_close(gather, folder):
    """Their scales are of a rank's own part of a weight."""
    keys: dict[str, Any] = {"training.mixed_precision_param": "bfloat16", "training.steps": 3}
    keys |= {"job.dump_folder": str(folder / f"low {gather}")}
    if gather is not None:
        keys |= {"model.converters": ["mtp", "quantize.linear.float8"]}
        keys |= {"quantize.linear.float8.enable_fsdp_float8_all_gather": gather}
    found, _ = run_ranks(2, low_precision, folder, keys)
    expected = train(config_of(folder, WIDE, keys))
    torch.testing.assert_close(found.losses, expected.losses, rtol=0.02, atol=0)
