"""The parts of the trainer that stand alone; whole runs are in tests/integration."""

from __future__ import annotations

import math

import pytest
import torch

from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.ops import LossOptions
from torchtitan_mtp.trainer import StepLosses, TrainState, loss_options


def test_step_losses_are_means_over_valid_targets():
    """Two micro-batches with 4 and 1 targets of head 1: a sum over 5, not a mean of means."""
    losses = StepLosses(2, torch.device("cpu"))
    first, second = (1.5, [8.0, 3.0], [4, 3], [2, 0]), (0.5, [7.0, 0.0], [1, 0], [1, 0])
    for micro_batch in (first, second):
        losses.add(*map(torch.tensor, micro_batch))
    assert vars(losses.reduce()) == {
        "losses": [3.0, 1.0],
        "accuracies": [0.6, 0.0],
        "targets": [5.0, 3.0],
        "total": 2.0,
        "max_loss": 3.0,
    }


@pytest.mark.parametrize("first", [0, 3])
def test_without_targets_there_is_no_mean(first):
    losses = StepLosses(2, torch.device("cpu"))
    losses.add(*map(torch.tensor, (0.0, [0.0, 0.0], [first, 0], [0, 0])))
    reduced, mean = losses.reduce(), 0.0 if first else math.nan
    assert reduced.targets == [first, 0]
    assert str(reduced.losses) == str(reduced.accuracies) == str([mean, math.nan])
    assert str([reduced.total, reduced.max_loss]) == str([mean, mean])


def test_train_state_is_plain_data():
    state = TrainState(3, 4096)
    other = TrainState()
    other.load_state_dict(state.state_dict())
    assert other == state and state.state_dict() == vars(state)


def test_every_key_of_the_loss_table_is_passed_on():
    config = JobConfig()
    config.loss.chunk_rows, config.loss.z_loss = 7, 1e-4
    options = loss_options(config, softcap=30.0)  # the model's, which may be its own
    assert options == LossOptions(chunk_rows=7, z_loss=1e-4, softcap=30.0)
    config.compile.enable, config.compile.backend = True, "aot_eager"
    assert loss_options(config, None).passes == "compiled"
    config.compile.components = ["model"]
    assert loss_options(config, None).passes == "eager"
    config.loss.passes, config.loss.bf16_logits = "triton", True
    assert loss_options(config, None) == options._replace(
        softcap=None, passes="triton", bf16_logits=True, compile_backend="aot_eager"
    )
