"""Which experts ranks have, and how much they gather of them; the other ranks are torch's fake
group. What ranks compute together: tests/distributed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.small import ARGS, DEEPSEEK
from torchtitan_mtp.config import MTP, JobConfig
from torchtitan_mtp.distributed.mesh import Degrees, world_of
from torchtitan_mtp.distributed.parallelize import parallelize
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.args import ModelArgs
from torchtitan_mtp.models.transformer import Transformer, build_model
from torchtitan_mtp.mtp import add_heads
from torchtitan_mtp.mtp.schedule import block_units

CHAIN = MTP(heads="sequential", num_future_tokens=2)


@pytest.fixture
def build() -> Iterator[Callable[..., Transformer]]:
    """A model as the last rank of some degrees has it."""

    def start(degrees: Degrees, shape: ModelArgs = DEEPSEEK) -> Transformer:
        rank, size = degrees.ranks - 1, degrees.ranks
        dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
        model = add_heads(build_model(replace(shape, n_layers=2)), CHAIN)
        world = world_of(torch.device("cpu"), degrees)
        return parallelize(model, JobConfig(), world, torch.float32, seed=0)

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


def held(model: Transformer, block: str) -> list[torch.Tensor]:
    """This rank's part of the experts' matrices in a block."""
    weights = model.get_submodule(block).get_submodule("moe.experts").parameters()
    return [w.to_local() if isinstance(w, DTensor) else w for w in weights]


@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize("block", ["layers.1", "mtp.heads.0.block"])
def test_what_a_rank_gathers_of_experts_falls_with_the_ranks_that_share_them(ep, block, build):
    model = build(Degrees(dp_shard=4, ep=ep))
    whole = 8 * 3 * DEEPSEEK.moe.hidden_dim * DEEPSEEK.dim  # 8 experts of three matrices
    assert sum(w.numel() for w in held(model, block)) == whole / 4  # as without sharing
    units = block_units(model.get_submodule(block.removesuffix(".block")))
    assert len(units) == (1 if ep == 1 else 2)
    for unit in units:
        unit.unshard()
    assert sum(w.numel() for w in held(model, block)) == whole / ep


def test_experts_lie_as_everywhere(build):
    """On the last rank of 8, the second of 2 that share experts: of experts 4 to 7 a fourth each
    of its three matrices' rows, for a fourth of four is one expert."""
    model = build(Degrees(dp_shard=8, ep=2))
    (w1, *_) = model.get_submodule("layers.1.moe.experts").parameters()
    assert w1.shape == (8, 8, 16)
    assert torch.equal(w1.to_local(), whole_weight("layers.1.moe.experts.w1")[7:])


def test_fewer_experts_than_ranks_are_cut_within(build):
    model = build(Degrees(dp_shard=16, ep=4))  # two experts a rank, on four ranks
    (w1, *_) = model.get_submodule("layers.1.moe.experts").parameters()
    assert torch.equal(w1.to_local(), whole_weight("layers.1.moe.experts.w1")[6:, 6:])


def whole_weight(name: str) -> torch.Tensor:
    """As one process initialises it."""
    model = add_heads(build_model(replace(DEEPSEEK, n_layers=2)), CHAIN)
    model.to_empty(device="cpu")
    model.init_weights(0)
    return model.get_parameter(name).detach()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (ARGS, "the model has no experts to share; expected 1, set it"),
        (DEEPSEEK, "expected a divisor of the experts of a layer, num_experts = 8; the nearest is"),
    ],
)
def test_experts_that_ranks_cannot_share(shape, message, build):
    with pytest.raises(UserError) as caught:
        build(Degrees(dp_shard=3, ep=3), shape)
    assert str(caught.value).startswith(f"parallelism.expert_parallel_degree = 3: {message}")
