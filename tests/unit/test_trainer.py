"""The parts of the trainer that stand alone; whole runs are in tests/integration."""

from __future__ import annotations

import math
from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn

from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.ops import LossOptions
from torchtitan_mtp.ops.backends import BACKENDS
from torchtitan_mtp.trainer import (
    StepLosses,
    TrainState,
    clip_gradients,
    loss_options,
    micro_batches_per_step,
)


@pytest.mark.parametrize(
    ("local", "whole", "ranks", "expected"),
    [(8, -1, 4, 1), (8, 32, 4, 1), (2, 32, 4, 4), (1, 6, 3, 2), (3, 3, 1, 1)],
)
def test_micro_batches(local, whole, ranks, expected):
    config = JobConfig()
    config.training.local_batch_size, config.training.global_batch_size = local, whole
    assert micro_batches_per_step(config, ranks) == expected


@pytest.mark.parametrize(
    ("local", "whole", "ranks", "cure"), [(2, 6, 2, 8), (8, 8, 2, 16), (3, 10, 1, 12)]
)
def test_a_global_batch_that_the_ranks_cannot_share(local, whole, ranks, cure):
    config = JobConfig()
    config.training.local_batch_size, config.training.global_batch_size = local, whole
    message = rf"global_batch_size = {whole} .*local_batch_size = {local} .*{ranks}.*try {cure}$"
    with pytest.raises(UserError, match=message):
        micro_batches_per_step(config, ranks)
    config.training.global_batch_size = cure
    assert micro_batches_per_step(config, ranks) * local * ranks == cure  # the cure works


def test_step_losses_are_means_over_valid_targets():
    """Two micro-batches with 4 and 1 targets of head 1: a sum over 5, not a mean of means."""
    losses = StepLosses(2, torch.device("cpu"))
    first, second = (1.5, [8.0, 3.0], [4, 3], [2, 0]), (0.5, [7.0, 0.0], [1, 0], [1, 0])
    for micro_batch in (first, second):
        losses.add(*map(torch.tensor, micro_batch))
    assert losses.reduce() == {
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
    assert reduced["targets"] == [first, 0]
    assert str(reduced["losses"]) == str(reduced["accuracies"]) == str([mean, math.nan])
    assert str([reduced["total"], reduced["max_loss"]]) == str([mean, mean])


def test_clipping():
    model = nn.Linear(3, 2, bias=False)
    gradient = torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
    model.weight.grad = gradient.clone()
    assert clip_gradients(model, 10.0) == 5.0
    torch.testing.assert_close(model.weight.grad, gradient)
    assert clip_gradients(model, 1.0) == 5.0
    torch.testing.assert_close(model.weight.grad, gradient / 5, rtol=1e-5, atol=0)
    assert clip_gradients(model, torch.inf) == pytest.approx(1.0)


def test_train_state_is_plain_data():
    state = TrainState(3, 4096)
    other = TrainState()
    other.load_state_dict(state.state_dict())
    assert other == state and state.state_dict() == vars(state)


def test_every_key_of_the_loss_table_is_passed_on():
    config = JobConfig()
    config.loss.chunk_rows, config.loss.z_loss = 7, 1e-4
    assert loss_options(config) == LossOptions(chunk_rows=7, z_loss=1e-4)
    config.compile.enable = True
    assert loss_options(config).compile
    config.compile.components = ["model"]
    assert not loss_options(config).compile


def test_the_backends_of_the_loss_table_are_the_ops():
    assert get_args(get_type_hints(type(JobConfig().loss))["backend"]) == tuple(BACKENDS)
