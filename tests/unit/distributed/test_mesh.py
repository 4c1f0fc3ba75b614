"""Degrees of data parallelism."""

from __future__ import annotations

import pytest

from torchtitan_mtp.config import Parallelism
from torchtitan_mtp.distributed.mesh import data_degrees
from torchtitan_mtp.errors import UserError


@pytest.mark.parametrize(
    ("replicate", "shard", "world", "expected"),
    [
        (1, -1, 1, (1, 1)),
        (1, -1, 8, (1, 8)),
        (2, -1, 8, (2, 4)),
        (8, -1, 8, (8, 1)),
        (4, 2, 8, (4, 2)),
    ],
)
def test_degrees(replicate, shard, world, expected):
    parallelism = Parallelism(
        data_parallel_replicate_degree=replicate, data_parallel_shard_degree=shard
    )
    assert data_degrees(parallelism, world) == expected


@pytest.mark.parametrize(
    ("replicate", "shard", "world"), [(3, -1, 8), (1, 4, 8), (2, 8, 8), (0, -1, 8), (-1, -1, 8)]
)
def test_degrees_that_do_not_make_the_world(replicate, shard, world):
    parallelism = Parallelism(
        data_parallel_replicate_degree=replicate, data_parallel_shard_degree=shard
    )
    with pytest.raises(UserError, match=rf"replicate_degree = {replicate} .*number of ranks, 8"):
        data_degrees(parallelism, world)
