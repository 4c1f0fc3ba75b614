"""How a sequence is cut for ranks, what their queries see, and what they keep alive; the other
ranks are torch's fake group. What ranks compute together: tests/distributed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.allocations import most_alive
from tests.small import small_model, small_window
from torchtitan_mtp.config import MTP
from torchtitan_mtp.data.targets import Window, make_batch
from torchtitan_mtp.models import context_parallel
from torchtitan_mtp.models.context_parallel import ContextParallel
from torchtitan_mtp.mtp import ENGINES
from torchtitan_mtp.ops import LossOptions


@pytest.fixture
def ranks() -> Iterator[Callable[[int, int], ContextParallel]]:
    """(rank, size) -> the ranks as that one sees them."""

    def start(rank: int, size: int) -> ContextParallel:
        dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
        return ContextParallel(dist.group.WORLD)

    yield start
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("rank", "own"), [(0, [0, 1, 10, 11]), (1, [2, 3, 8, 9]), (2, [4, 5, 6, 7])]
)
def test_an_early_chunk_and_a_late_one(rank, own, ranks):
    batch = make_batch(small_window(2, 12 + 3), 3)
    part = ranks(rank, 3).shard(batch)
    assert part.positions.tolist() == [own, own]
    for whole, cut in zip(batch[:5], part[:5], strict=True):
        assert torch.equal(cut, whole[:, own]) and cut.is_contiguous()


POSITIONS = [[0, 1, 6, 7], [2, 3, 4, 5]]  # of two ranks
DOCUMENTS = [0, 0, 0, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("blocks", [False, True])
def test_what_queries_see(blocks, rank, packed, ranks, monkeypatch):
    window = Window(torch.zeros(2, 9, dtype=torch.int64), torch.tensor([[*DOCUMENTS, 3]] * 2))
    batch, here = make_batch(window, 1), ranks(rank, 2)
    at = torch.tensor(POSITIONS[0] + POSITIONS[1])
    monkeypatch.setattr(here, "gather", lambda x: at.expand(len(x), 8))
    monkeypatch.setattr(here, "whole", lambda x: batch.doc_ids)
    mask = here.mask(here.shard(batch), packed, blocks)
    rows = 2 if packed else 1
    for row in range(rows):
        for q, at in enumerate(POSITIONS[rank]):
            for k, key in enumerate(POSITIONS[0] + POSITIONS[1]):
                seen = key <= at and (not packed or DOCUMENTS[key] == DOCUMENTS[at])
                if isinstance(mask, Tensor):
                    assert mask.shape == (rows, 1, 4, 8)
                    assert mask[row, 0, q, k].item() == (0 if seen else -torch.inf)
                else:
                    assert mask.shape == (rows, 1, 4, 8)
                    assert mask.mask_mod(*map(torch.tensor, (row, 0, q, k))).item() == seen


@pytest.mark.exhaustive
@pytest.mark.parametrize("table", [{}, {"heads": "sequential"}])
def test_two_ranks_keep_half_of_the_activations_each(table, ranks):
    """Of 2048 tokens, beside weights and gradients, which are there before. Every layer gathers
    keys and values whole, and the mask is one float a query and key."""
    size, n = 2048, 3
    mtp = MTP(num_future_tokens=n, **table)
    shape = {"dim": 256, "n_layers": 4, "max_seq_len": size, "attn_mask_type": "causal"}
    model, here = small_model(mtp, **shape), ranks(0, 2)
    batch = make_batch(small_window(1, size + n), n)

    def peak(part) -> int:
        scales = torch.full((n,), 1 / size)
        options = LossOptions(chunk_rows=64)
        ENGINES[mtp.engine](model, part, scales, options, True)
        return most_alive(lambda: ENGINES[mtp.engine](model, part, scales, options, True))

    alone = peak(batch)
    model.context_parallel = here
    assert peak(here.shard(batch)) < 0.6 * alone


@pytest.mark.parametrize("length", [5, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_blocks_that_are_left_out_and_that_are_seen_whole(packed, length, monkeypatch):
    """Of 2 x 2: all that is seen is in a block that is listed, and only that in one that is listed
    as whole; some are left out."""
    monkeypatch.setattr(context_parallel, "BLOCK", 2)
    size = 4 * length
    own = torch.tensor([[*range(length, 2 * length), *range(2 * length, 3 * length)]])
    rest = [*range(length), *range(3 * length, size)]
    at = torch.cat((torch.tensor([rest]), own), dim=1)  # rank 1 of 2, its keys last
    start = own // 7 * 7 if packed else torch.zeros_like(own)
    mask = context_parallel._block_mask(own, at, start)
    seen = (at[:, None] <= own[..., None]) & (at[:, None] >= start[..., None])  # [1, Q, K]
    expected = torch.zeros(1, 2 * -(-seen.shape[1] // 2), 2 * -(-size // 2))
    expected[:, : seen.shape[1], :size] = seen.float()
    blocks = expected.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).mean((2, 4))  # share of each
    partial, whole = (
        torch.zeros_like(blocks, dtype=torch.bool).scatter_(
            2, indices[:, 0].long(), torch.arange(indices.shape[-1]) < counts[:, 0, :, None]
        )
        for counts, indices in (
            (mask.kv_num_blocks, mask.kv_indices),
            (mask.full_kv_num_blocks, mask.full_kv_indices),
        )
    )
    assert (whole <= (blocks == 1)).all() and ((blocks > 0) <= (partial | whole)).all()
    assert whole.any() and (partial | whole).float().mean() <= (0.5 if packed else 0.75)
