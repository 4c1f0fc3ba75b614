"""Decoding with caches of latents, and with experts, against full forwards without either."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, head_logits, naive_greedy, random_model

from torchtitan_mtp.inference import generate
from torchtitan_mtp.inference.decoding import Decoder
from torchtitan_mtp.inference.rows import Rows
from torchtitan_mtp.inference.sampling import Sampler
from torchtitan_mtp.models.args import LatentArgs, MoEArgs
from torchtitan_mtp.models.transformer import Transformer

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5], [3, 5, 8]]
LATENT = LatentArgs(
    q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8
)
MOE = MoEArgs(num_experts=6, hidden_dim=16, num_expert_groups=3, num_limited_groups=2)
KINDS = {"latent": {"latent": LATENT}, "experts": {"moe": MOE}}
KINDS["deepseek"] = KINDS["latent"] | KINDS["experts"]
N = 3


def model_of(kind: str, heads: str, share: bool = False, n: int = N) -> Transformer:
    return random_model(heads, n, share, seed=2, n_kv_heads=None, **KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "share"), FAMILIES)
def test_plain_and_speculative_decoding_are_full_forwards(kind, heads, share) -> None:
    model = model_of(kind, heads, share)
    expected = [naive_greedy(model, prompt, 16, N) for prompt in PROMPTS]
    assert len({token for text in expected for token in text}) > 3
    for prompt, text in zip(PROMPTS, expected, strict=True):
        assert generate(model, [prompt], 16).tokens == [text]
    plain = generate(model, PROMPTS, 16)  # rows of one batch, at places of their own
    speculative = generate(model, PROMPTS, 16, speculative=True)
    assert plain.tokens == speculative.tokens == expected
    assert speculative.stats.drafted[0] > 0


@pytest.mark.parametrize("counts", [[2], [2, 1, 1]])
@pytest.mark.parametrize(("heads", "share"), FAMILIES)
def test_drafts_are_those_of_a_full_forward(heads, share, counts) -> None:
    model, prompt = model_of("deepseek", heads, share), PROMPTS[0]
    decoder, rows = Decoder(model, [prompt], 50, 2, Sampler()), Rows(1, 50, None, 2)
    rows.start(decoder.prefill())
    for count in counts * 3:
        plan = decoder.plan(count)
        decoder.predict(plan)
        (p,) = decoder.last
        text = decoder.tokens[0, : p + 2 + count].tolist()
        logits = head_logits(model, [*text, 0, 0][: p + N], N)[1 : 1 + count, p]
        assert text[p + 2 :] == logits.argmax(-1).tolist()
        decoder.accept(rows.accept(*decoder.verify(plan, None).tolist()))


@pytest.mark.parametrize(
    "heads", ["parallel", pytest.param("sequential", marks=pytest.mark.exhaustive)]
)
def test_compiled_steps_give_the_same_tokens(heads, graphs) -> None:
    model = model_of("deepseek", heads)
    compiled = generate(model, PROMPTS, 12, speculative=True, compile=True)
    assert compiled.tokens == generate(model, PROMPTS, 12).tokens
    assert len(graphs) == 1


def test_a_cache_holds_the_latents_alone() -> None:
    decoder = Decoder(model_of("deepseek", "sequential"), [[1, 2]], 4, 2, Sampler())
    length = decoder.positions.max_len
    for cache in (*decoder.caches, *decoder.drafter.caches):
        assert cache.k.shape == (1, 1, length, LATENT.qk_rope_head_dim)
        assert cache.v.shape == (1, 1, length, LATENT.kv_lora_rank)


def test_decoding_counts_no_tokens_of_experts() -> None:
    model = model_of("deepseek", "sequential")
    generate(model, PROMPTS, 4, speculative=True)
    assert all(moe.tokens_per_expert.sum() == 0 for _, moe in model.named_moe_layers())
    assert torch.equal(model.layers["1"].moe.expert_bias, torch.zeros(6))
