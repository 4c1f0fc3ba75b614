"""Gradients over micro-batches: what is alive of them on one of eight ranks, by every allocation.

The seven others are torch's fake group: collectives of it move nothing, and allocate as others do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.allocations import most_alive
from tests.small import ARGS
from torchtitan_mtp.config import MTP, JobConfig
from torchtitan_mtp.data.targets import Window, make_batch
from torchtitan_mtp.distributed import parallelize as parallelizing
from torchtitan_mtp.distributed.mesh import Degrees, World, world_of
from torchtitan_mtp.distributed.parallelize import parallelize
from torchtitan_mtp.models.transformer import build_model
from torchtitan_mtp.models.trunk import Trunk
from torchtitan_mtp.mtp import ENGINES, add_heads
from torchtitan_mtp.ops import LossOptions

RANKS, N = 8, 3


@pytest.fixture
def world() -> Iterator[World]:
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    yield world_of(torch.device("cpu"), Degrees(dp_shard=RANKS))
    dist.destroy_process_group()


def training_of(world: World, table: dict[str, str]) -> tuple[Trunk, Callable[[bool], object]]:
    """A small model with heads of that table, and its micro-batch: of whether it reduces
    gradients."""
    config = JobConfig(mtp=MTP(num_future_tokens=N, **table))  # type: ignore[arg-type]
    config.activation_checkpoint.mode = "full"
    shape = {"dim": 64, "multiple_of": 64, "vocab_size": 512, "attn_mask_type": "causal"}
    model = build_model(replace(ARGS, **shape), torch.float32)
    add_heads(model, config.mtp)
    model = parallelize(model, config, world, torch.float32, 0)
    tokens = torch.zeros(1, 8 + N, dtype=torch.int64)
    batch = make_batch(Window(tokens, torch.zeros_like(tokens)), N)
    engine, scales = ENGINES[config.mtp.engine], torch.full((N,), 1 / 8)
    return model, lambda reduce: engine(model, batch, scales, LossOptions(), reduce)


def peaks(world: World, table: dict[str, str], *steps: list[bool]) -> tuple[list[int], int]:
    """Most bytes alive in each of the steps above the sharded weights, which are there before, and
    the bytes of all weights. A step: whether each of its micro-batches reduces gradients."""
    model, micro_batch = training_of(world, table)

    def measure(step: list[bool]) -> int:
        def run() -> None:
            for reduce in step:
                micro_batch(reduce)
            model.zero_grad()

        return most_alive(run)

    measure([True])  # what is made once
    size = sum(param.numel() * param.element_size() for param in model.parameters())
    return [measure(step) for step in steps], size


every_family = pytest.mark.parametrize(
    "table",
    [{}, {"engine": "joint"}, {"heads": "sequential"}],
    ids=["parallel", "joint", "sequential"],
)


@pytest.mark.filterwarnings("ignore")
@every_family
def test_whole_gradients_are_kept_only_where_asked(table: dict[str, str], world: World) -> None:
    (one, three, kept), size = peaks(world, table, [True], [True] * 3, [False, False, True])
    shards = size / RANKS
    # The sharded gradients of the micro-batches before, beside what one has alive: some of its own
    # at its peak, where a later one adds to those and frees its own at once.
    assert shards * 0.4 < three - one < shards * 0.8
    assert kept - one > size * 0.6  # a block's whole gradient is alive in any backward


@pytest.mark.filterwarnings("ignore")
@every_family
def test_output_is_not_gathered_beside_the_trunks_blocks(
    table: dict[str, str], world: World
) -> None:
    model, micro_batch = training_of(world, table)
    gathered = []

    def look(*_: object) -> None:
        gathered.append(not isinstance(model.output.weight, DTensor))

    for k in (0, 1):  # their backwards
        model.layers[str(k)].register_full_backward_hook(look)
    for reduce in (False, True):
        micro_batch(reduce)
    assert gathered == [False] * 4


@pytest.mark.parametrize(("spare", "second"), [(0, True), (-1, False)])
def test_a_second_buffer_of_reductions_is_for_blocks_of_a_size(
    spare: int, second: bool, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = 3 * 64 * 64 + 3 * 64 * 192 + 2 * 64  # attention, feed-forward, norms
    monkeypatch.setattr(parallelizing, "_MOST_BUFFERED", 4 * block + spare)
    made = []
    monkeypatch.setattr(parallelizing, "overlap_reductions", made.append)
    model, _ = training_of(world, {})
    assert made == [model] * second
