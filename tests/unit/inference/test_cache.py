"""Spans of positions, and caches that forget by being overwritten."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_model

from torchtitan_mtp.inference.cache import LayerCache, Positions, shift_index, take


def positions_of(batch: int, max_len: int = 10) -> Positions:
    model = random_model()
    return Positions(model, batch, max_len)


@pytest.mark.parametrize("starts", [[3, 3], [3, 1]])
def test_a_span_picks_its_positions_and_sees_what_came_before(starts: list[int]) -> None:
    span = positions_of(2).span(starts, 3)
    text = torch.arange(20).view(2, 10)
    assert text[span.where].tolist() == [
        [10 * b + s + j for j in range(3)] for b, s in enumerate(starts)
    ]
    assert text[shift_index(span.where, 2)].tolist() == (text[span.where] + 2).tolist()
    mask = span.context.mask
    assert isinstance(mask, torch.Tensor) and span.end == 6
    mask = mask.expand(2, 1, 3, 6)
    for b, start in enumerate(starts):
        for j in range(3):
            visible = [key <= start + j for key in range(6)]
            assert (mask[b, 0, j] == 0).tolist() == visible
            assert (mask[b, 0, j] == -torch.inf).tolist() == [not v for v in visible]


def test_plain_causal_attention_needs_no_mask() -> None:
    positions = positions_of(2)
    assert positions.span([0, 0], 4).context.mask is None
    assert positions.span([5, 5], 1).context.mask is None
    assert positions.span([5, 4], 1).context.mask is not None


def test_angles_are_those_of_the_positions() -> None:
    positions, model = positions_of(2), random_model()
    cos = positions.span([2, 6], 2).context.cos  # [2, 2, 1, hd/2]
    assert torch.equal(cos[1, 1, 0], model.rope_cos[7])
    assert torch.equal(positions.span([4, 4], 2).context.cos[0, 1, 0], model.rope_cos[5])


@pytest.mark.parametrize("starts", [[1, 1], [1, 4]])
def test_a_cache_returns_what_was_stored_and_overwrites(starts: list[int]) -> None:
    positions = positions_of(2)
    cache = LayerCache(random_model().layers["0"], positions)
    k, v = torch.randn(2, 2, 2, 4, 8, dtype=torch.float64).unbind(0)  # [B, KV, 4, hd]
    cache.at(positions.span(starts, 4))(k, v)
    # Two of the four were rejected: the next forward starts two positions later, not four.
    newer = torch.randn(2, 2, 3, 8, dtype=torch.float64)
    span = positions.span([s + 2 for s in starts], 3)
    keys, values = cache.at(span)(newer, -newer)
    for b, s in enumerate(starts):
        assert torch.equal(keys[b, :, s : s + 2], k[b, :, :2])
        assert torch.equal(keys[b, :, s + 2 : s + 5], newer[b])
        assert torch.equal(values[b, :, s + 2 : s + 5], -newer[b])
    assert keys.shape == (2, 2, max(starts) + 5, 8)


def test_take_picks_one_column_a_row() -> None:
    x = torch.arange(12).view(2, 3, 2)
    assert take(x, [1, 1]).tolist() == [[[2, 3]], [[8, 9]]]
    assert take(x, [2, 0]).tolist() == [[[4, 5]], [[6, 7]]]
