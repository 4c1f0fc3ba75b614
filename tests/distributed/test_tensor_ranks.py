"""The same tokens on two gloo ranks: what the ranks exchange, and whole trainings against one
process.

Losses and gradients of every family: test_gradients.py. The ranks are started once, run everything,
and the tests look at what came of it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from runs import Run, config_of, train
from spawn import run_ranks
from test_context_ranks import RUNS
from tests.small import ARGS, small_window
from torchtitan_mtp.config import MTP, JobConfig
from torchtitan_mtp.data.targets import make_batch
from torchtitan_mtp.distributed.mesh import init_world
from torchtitan_mtp.distributed.parallelize import parallelize
from torchtitan_mtp.models import context_parallel
from torchtitan_mtp.models.transformer import build_model
from torchtitan_mtp.mtp import ENGINES, add_heads
from torchtitan_mtp.ops import LossOptions
from two_ranks import STEPS, Trainings, assert_trained_alike, blocks, counted, train_on_rank

WIDE = {"model.vocab_size": 264}  # the byte tokenizer's, and some that ranks can share
TRAININGS = Trainings(RUNS, {**WIDE, "parallelism.tensor_parallel_degree": 2}, WIDE)


def collectives(mtp: MTP, ac: str) -> Counter[str]:
    """Gathers and scatters of positions in a step's forward and backward."""
    config = JobConfig()
    config.mtp, config.activation_checkpoint.mode = mtp, ac
    config.parallelism.tensor_parallel_degree = 2
    model = add_heads(build_model(replace(ARGS, vocab_size=30)), mtp)
    model = parallelize(model, config, init_world(config.parallelism), torch.float32, seed=0)
    n = mtp.num_future_tokens
    batch = make_batch(small_window(2, 12 + n), n)
    with counted(context_parallel, "_all_gather", "_reduce_scatter") as counts:
        ENGINES[mtp.engine](model, batch, torch.ones(n), LossOptions(), True)
    return counts


def everything(rank: int, folder: Path) -> dict[str, Any]:
    counts = {name: collectives(*step) for name, step in STEPS.items()}
    return {"counts": counts, **TRAININGS.on_ranks(folder)}


@pytest.fixture(scope="module")
def alone(folder) -> Run:
    return TRAININGS.alone(folder)


@pytest.fixture(scope="module")
def ranks(folder, alone) -> list[dict[str, Any]]:
    return run_ranks(2, everything, folder, timeout=400)


def test_heads_add_only_their_own_collectives(ranks):
    """A block gathers twice, for attention and feed-forward, and scatters what comes out; a loss
    gathers once; the embedding scatters once. Backwards do the reverse, and a block that is
    computed anew does it all anew."""
    for name, found in ranks[0]["counts"].items():
        once, again = blocks(name, layers=3)
        each = 4 * once + 2 * again + STEPS[name][0].num_future_tokens + 1
        assert found == {"_all_gather": each, "_reduce_scatter": each}, name


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
@pytest.mark.parametrize("gather", [None, False, True])
def test_bfloat16_and_float8_stay_close(gather, folder):
    """Their scales are of a rank's own part of a weight."""
    keys: dict[str, Any] = {"training.mixed_precision_param": "bfloat16", "training.steps": 3}
    keys |= {"job.dump_folder": str(folder / f"low {gather}")}
    if gather is not None:
        keys |= {"model.converters": ["mtp", "quantize.linear.float8"]}
        keys |= {"quantize.linear.float8.enable_fsdp_float8_all_gather": gather}
    found, _ = run_ranks(2, train_on_rank, folder, TRAININGS.of_ranks, keys)
    expected = train(config_of(folder, WIDE, keys))
    torch.testing.assert_close(found.losses, expected.losses, rtol=0.02, atol=0)
