"""Rotary positions against naive forms; attention over documents."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.naive import rotate
from tests.small import ARGS, small_model, small_window
from torchtitan_mtp.data.targets import make_batch
from torchtitan_mtp.models.args import RoPEScaling
from torchtitan_mtp.models.attention import attend
from torchtitan_mtp.models.rope import apply_rope, rope_tables


@pytest.mark.parametrize("theta", [100.0, 10000.0, 500000.0])
def test_rope_is_a_complex_rotation(theta):
    args = replace(ARGS, rope_theta=theta, dim=64)  # four heads of 16
    x = torch.randn(2, 50, 4, 16, dtype=torch.float64)
    cos, sin = rope_tables(args, "cpu")
    assert cos.shape == (64, 8) and cos.dtype == torch.float32
    found = apply_rope(x, cos[:50, None], sin[:50, None])
    expected = torch.stack([rotate(row, theta) for row in x])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert found.dtype == x.dtype
    assert torch.equal(found[:, 0], x[:, 0].float().double())  # position 0 does not turn


def test_rope_depends_on_differences_of_positions_only():
    cos, sin = rope_tables(replace(ARGS, dim=64, max_seq_len=200), "cpu")
    q, k = torch.randn(1, 5, 4, 16), torch.randn(1, 5, 4, 16)

    def scores(start):
        place = slice(start, start + 5)
        turned = [apply_rope(x, cos[place, None], sin[place, None]) for x in (q, k)]
        return torch.einsum("bqhd,bkhd->bhqk", *turned)

    torch.testing.assert_close(scores(0), scores(150), rtol=1e-4, atol=1e-4)


def published_scaling(freqs, scale_factor, low_freq_factor, high_freq_factor, old_context_len):
    """`apply_scaling` of meta-llama/llama-models (models/llama3/model.py), one frequency a time."""
    low_freq_wavelen = old_context_len / low_freq_factor
    high_freq_wavelen = old_context_len / high_freq_factor
    new_freqs = []
    for freq in freqs:
        wavelen = 2 * math.pi / freq
        if wavelen < high_freq_wavelen:
            new_freqs.append(freq)
        elif wavelen > low_freq_wavelen:
            new_freqs.append(freq / scale_factor)
        else:
            smooth = (old_context_len / wavelen - low_freq_factor) / (
                high_freq_factor - low_freq_factor
            )
            new_freqs.append((1 - smooth) * freq / scale_factor + smooth * freq)
    return new_freqs


@pytest.mark.parametrize(
    "scaling",
    [RoPEScaling(factor=8.0), RoPEScaling(factor=32.0), RoPEScaling(4.0, 1.0, 2.0, 2048)],
)
def test_llama_3_1_scaling(scaling):
    args = replace(
        ARGS, dim=512, n_heads=4, rope_theta=500000.0, rope_scaling=scaling, max_seq_len=3
    )
    freqs = [500000.0 ** (-2 * j / 128) for j in range(64)]
    expected = published_scaling(
        freqs,
        scaling.factor,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
        scaling.original_max_seq_len,
    )
    same = sum(a == b for a, b in zip(freqs, expected, strict=True))
    assert 0 < same < 64  # some stay and some change
    cos, sin = rope_tables(args, "cpu")
    angles = torch.tensor(expected, dtype=torch.float64)
    for position in (0, 1, 2):
        for table, function in ((cos, torch.cos), (sin, torch.sin)):
            row = function(position * angles)
            torch.testing.assert_close(table[position].double(), row, atol=1e-6, rtol=0)


def test_grouped_heads_under_an_added_mask():
    """As decoding has them, against softmax(q k) v written out, head by head."""
    generator = torch.Generator().manual_seed(0)
    batch, heads, groups, queries, keys, width = 2, 6, 2, 3, 7, 4
    q = torch.randn(batch, heads, queries, width, generator=generator)
    k, v = (torch.randn(batch, groups, keys, width, generator=generator) for _ in range(2))
    seen = torch.rand(batch, 1, queries, keys, generator=generator) < 0.6
    seen[..., 0] = True
    mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    found = attend(q, k, v, mask)
    assert found.shape == q.shape
    for head in range(heads):
        own = head // (heads // groups)
        scores = q[:, head] @ k[:, own].mT / width**0.5 + mask[:, 0]
        torch.testing.assert_close(found[:, head], scores.softmax(-1) @ v[:, own])


def test_causal_attention_ignores_documents_unless_asked():
    window = small_window(2, 21)
    apart = window._replace(doc_ids=torch.zeros_like(window.doc_ids))
    causal = small_model(attn_mask_type="causal")
    packed = small_model(attn_mask_type="block_causal")
    with torch.no_grad():
        assert torch.equal(causal(make_batch(window, 1))[0], causal(make_batch(apart, 1))[0])
        assert not torch.equal(packed(make_batch(window, 1))[0], packed(make_batch(apart, 1))[0])
        torch.testing.assert_close(packed(make_batch(apart, 1))[0], causal(make_batch(apart, 1))[0])
