"""Latent attention: its two ways to the same result, and YaRN against DeepSeek's own form."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.naive import latent_attention
from tests.small import DEEPSEEK, small_model
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.args import LatentArgs, RoPEScaling, YaRN
from torchtitan_mtp.models.attention import AttentionContext
from torchtitan_mtp.models.flavors import flavors, model_args
from torchtitan_mtp.models.latent_attention import LatentAttention
from torchtitan_mtp.models.rope import rope_tables

CASES = {
    "compressed queries": DEEPSEEK,
    "plain queries": replace(DEEPSEEK, latent=replace(DEEPSEEK.latent, q_lora_rank=0)),
}


class Kept:
    """A cache of everything so far."""

    def __init__(self) -> None:
        self.k = self.v = None

    def __call__(self, k, v):
        self.k = k if self.k is None else torch.cat((self.k, k), 2)
        self.v = v if self.v is None else torch.cat((self.v, v), 2)
        return self.k, self.v


def context_of(args, start: int, stop: int) -> AttentionContext:
    """Positions start..stop-1, each of which sees itself and what is before."""
    cos, sin = (table[None, start:stop, None] for table in rope_tables(args, "cpu"))
    mask = torch.arange(stop) <= torch.arange(start, stop)[:, None]
    return AttentionContext(cos, sin, None if start == 0 or stop - start == 1 else mask[None, None])


def attention_of(args) -> LatentAttention:
    attention = small_model(dtype=torch.float64, shape=args).layers["0"].attention
    for parameter in attention.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return attention


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_naive_attention(name):
    args = replace(CASES[name], attn_mask_type="causal")
    attention = attention_of(args)
    x = torch.randn(1, 11, 16, dtype=torch.float64)
    p = {f"a.{k}": v for k, v in attention.named_parameters()}
    expected = latent_attention(p, "a.", x[0], torch.zeros(11), args)
    found = attention(x, context_of(args, 0, 11))[0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # float32 angles


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sizes", [[11], [4, 7], [4, 1, 1, 3, 2], [1] * 11])
def test_over_latents_is_over_heads(name, sizes):
    """The same positions a few at a time, against what a cache keeps of those before."""
    args = CASES[name]
    attention, kept = attention_of(args), Kept()
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    parts, start = [], 0
    for size in sizes:
        context = context_of(args, start, start + size)
        parts.append(attention(x[:, start : start + size], context, kept))
        start += size
    expected = attention(x, context_of(args, 0, 11))
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-12, atol=1e-12)
    heads, rope, rank = attention.cache_shape
    assert kept.k.shape == (2, heads, 11, rope) and kept.v.shape == (2, heads, 11, rank)
    assert (heads, rope, rank) == (1, 4, 12)  # of 4 heads, each with a key of 10 and a value of 5


def published_yarn(dim, theta, factor, beta_fast, beta_slow, old):
    """DeepseekV3YarnRotaryEmbedding of the released modeling code, one frequency at a time."""

    def correction_dim(rotations):
        return dim * math.log(old / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(correction_dim(beta_fast)), 0)
    high = min(math.ceil(correction_dim(beta_slow)), dim - 1)
    if low == high:
        high += 0.001
    freqs = []
    for j in range(dim // 2):
        freq = theta ** (-2 * j / dim)
        keep = 1 - min(max((j - low) / (high - low), 0), 1)
        freqs.append(freq / factor * (1 - keep) + freq * keep)
    return freqs


@pytest.mark.parametrize(
    "yarn", [YaRN(), YaRN(4.0, 16.0, 2.0, 1.0, 1.0, 64), YaRN(mscale=0.707, mscale_all_dim=0.0)]
)
def test_yarn(yarn):
    args = replace(flavors["deepseek_v3"]["671B"], rope_scaling=yarn, max_seq_len=3)
    cos, sin = rope_tables(args, "cpu")
    expected = torch.tensor(
        published_yarn(
            64, 10000.0, yarn.factor, yarn.beta_fast, yarn.beta_slow, yarn.original_max_seq_len
        )
    )
    magnitude = (0.1 * yarn.mscale * math.log(yarn.factor) + 1) / (
        0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1
    )
    torch.testing.assert_close(cos[2], magnitude * (2 * expected).cos(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sin[1], magnitude * expected.sin(), rtol=1e-5, atol=1e-6)
    with torch.device("meta"):
        attention = LatentAttention(args)
    mscale = 0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1  # yarn_get_mscale, squared
    assert math.isclose(attention.scale, 192**-0.5 * mscale**2)


def changed(flavor="671B", **scaling):
    changes = {"rope_scaling": scaling}
    return model_args("deepseek_v3", flavor, tokenizer_vocab=9, changes=changes).rope_scaling


def test_scaling_over_a_flavors():
    assert changed(factor=8.0) == YaRN(factor=8.0)
    assert changed(beta_fast=16.0) == YaRN(beta_fast=16.0)
    assert changed(factor=1.0) is None  # none, as in the pre-training
    assert changed(rope_type="llama3", factor=8.0) == RoPEScaling(factor=8.0)
    assert changed("custom", rope_type="yarn", factor=8.0) == YaRN(factor=8.0)
    with pytest.raises(UserError, match=r"set model\.args\.rope_scaling\.factor"):
        changed("custom", mscale=0.5)
    with pytest.raises(UserError, match="low_freq_factor: is not of this kind"):
        changed(low_freq_factor=2.0)


def test_sizes_over_a_flavors():
    args = model_args(
        "deepseek_v3", "16B", tokenizer_vocab=9, changes={"latent": {"q_lora_rank": 96}}
    )
    assert args.latent == LatentArgs(q_lora_rank=96) and args.moe.num_experts == 64
    llama = model_args("llama3", "debugmodel", tokenizer_vocab=9, changes={"moe": {"top_k": 1}})
    assert llama.latent is None and llama.moe.top_k == 1  # mixtures in a Llama
    with pytest.raises(UserError, match=r"qk_rope_head_dim = 7: expected an even"):
        changes = {"latent": {"qk_rope_head_dim": 7}}
        model_args("deepseek_v3", "671B", tokenizer_vocab=9, changes=changes)
