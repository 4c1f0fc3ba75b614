"""Sampling: the distribution, and the same tokens with and without drafts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, random_model
from torch import Tensor

from torchtitan_mtp.inference import generate
from torchtitan_mtp.inference.sampling import Sampler

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def draws(count: int, logits: Tensor = LOGITS, **options: Any) -> Tensor:
    """Tokens at positions 0 .. count - 1 whose logits are all the same: [count]."""
    return Sampler(**options)(logits.expand(1, count, -1), [0])[0]


def assert_distributed(tokens: Tensor, probabilities: Tensor) -> None:
    """Chi-squared at a significance of 1e-4 (Wilson and Hilferty's approximation)."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    expected = probabilities.double() * len(tokens)
    assert counts[expected == 0].sum() == 0
    there = expected > 0
    statistic = ((counts - expected)[there] ** 2 / expected[there]).sum().item()
    freedom = int(there.sum()) - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert statistic < bound


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_distributed_as_the_softmax(temperature: float) -> None:
    tokens = draws(6000, temperature=temperature)
    assert_distributed(tokens, (LOGITS / temperature).softmax(-1))


def test_positions_and_rows_are_independent() -> None:
    p = LOGITS.softmax(-1)
    tokens = draws(8000, temperature=1.0).view(-1, 2)
    assert_distributed(tokens[:, 0] * 6 + tokens[:, 1], torch.outer(p, p).flatten())
    rows = Sampler(temperature=1.0)(LOGITS.expand(2, 3000, -1), [0, 0])
    assert_distributed(rows[0] * 6 + rows[1], torch.outer(p, p).flatten())


def test_a_filter_renormalises_what_it_keeps() -> None:
    p = LOGITS.softmax(-1)
    two = torch.where(torch.arange(6) < 2, p, 0)
    assert_distributed(draws(3000, temperature=1.0, top_k=2), two / two.sum())
    # p is .57 .21 .13 .08 ..: .57 + .21 + .13 is the first sum of .85 or more.
    three = torch.where(torch.arange(6) < 3, p, 0)
    assert_distributed(draws(3000, temperature=1.0, top_p=0.85), three / three.sum())
    assert set(draws(100, temperature=1.0, top_p=0.1).tolist()) == {0}
    assert set(draws(100, temperature=5.0, top_k=1).tolist()) == {0}


def test_top_p_follows_the_tokens_not_their_order() -> None:
    shuffled = torch.tensor([0.5, -3.0, 2.0, 0.0, 1.0, -1.0])
    assert set(draws(500, shuffled, temperature=1.0, top_p=0.85).tolist()) == {0, 2, 4}


def test_softcap_bends_the_logits_before_the_temperature() -> None:
    capped = 1.5 * torch.tanh(LOGITS / 1.5)
    tokens = draws(6000, temperature=0.7, softcap=1.5)
    assert_distributed(tokens, (capped / 0.7).softmax(-1))


def test_the_noise_is_that_of_seed_row_and_position() -> None:
    every = draws(50, temperature=1.0, seed=3)
    assert torch.equal(every, draws(50, temperature=1.0, seed=3))
    assert not torch.equal(every, draws(50, temperature=1.0, seed=4))
    later = Sampler(temperature=1.0, seed=3)(LOGITS.expand(1, 20, -1), [30])[0]
    assert torch.equal(every[30:], later)


def test_temperature_zero_is_greedy() -> None:
    logits = torch.randn(3, 4, 9)
    assert torch.equal(Sampler()(logits, [0, 0, 0]), logits.argmax(-1))


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.7}, {"temperature": 1.0, "top_k": 4}, {"temperature": 1.3, "top_p": 0.8}],
)
@pytest.mark.parametrize(("heads", "share"), FAMILIES)
def test_drafts_do_not_change_what_is_sampled(
    heads: str, share: bool, options: dict[str, Any]
) -> None:
    model, prompts = random_model(heads, 3, share), [[1, 2, 3], [4]]
    plain = generate(model, prompts, 25, seed=5, **options)
    speculative = generate(model, prompts, 25, seed=5, speculative=True, **options)
    assert speculative.tokens == plain.tokens
    assert plain.tokens != generate(model, prompts, 25, seed=6, **options).tokens
    assert plain.tokens[0] != plain.tokens[1]


def test_a_head_that_knows_what_head_1_does_is_always_right_when_sampling() -> None:
    # Without attention or feed-forward, and with tokens that all look alike, every head has
    # head 1's logits at every position; only equal noise makes them choose the same token.
    model = random_model("parallel", 4)
    with torch.no_grad():
        model.tok_embeddings.weight.copy_(model.tok_embeddings.weight[:1].expand(11, -1))
        for name, param in model.named_parameters():
            if name.endswith(("wo.weight", "w2.weight")):
                param.zero_()
    stats = generate(model, [[1]], 61, temperature=1.0, speculative=True).stats
    assert stats.conditional == [1, 1, 1] and stats.tokens_per_step == 4
