"""The micro-batches of a step."""

from __future__ import annotations

import pytest

from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.data.run import micro_batches_per_step
from torchtitan_mtp.errors import UserError


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
