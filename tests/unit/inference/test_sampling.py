"""Sampling: the distribution, of plain and of speculative decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, head_logits, random_model
from torch import Tensor

from torchtitan_mtp.errors import UserError
from torchtitan_mtp.inference import generate
from torchtitan_mtp.inference.sampling import Noise, Sampler, draw
from torchtitan_mtp.models.transformer import Transformer

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
CPU = torch.device("cpu")
NONE = torch.empty(1, 0, dtype=torch.long)


def draws(count: int, logits: Tensor = LOGITS, **options: Any) -> Tensor:
    """Tokens of `count` rows whose logits are all the same: [count]."""
    sampler = Sampler(**options)
    noise = sampler.noise(count, 0, len(logits), CPU)
    return sampler.verify(logits.expand(count, 1, -1), NONE.expand(count, 0), None, noise)[:, 0]


def fits(tokens: Tensor, probabilities: Tensor) -> bool:
    """Chi-squared at a significance of 1e-4 (Wilson and Hilferty's approximation).

    Tokens of which fewer than 5 are expected count as one.
    """
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    expected = probabilities.double() * len(tokens)
    if counts[expected == 0].sum() > 0:
        return False
    often = expected >= 5
    counts = torch.cat((counts[often], counts[~often].sum(0, keepdim=True)))
    expected = torch.cat((expected[often], expected[~often].sum(0, keepdim=True)))
    there = expected > 0
    statistic = ((counts - expected)[there] ** 2 / expected[there]).sum().item()
    freedom = int(there.sum()) - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3
    return statistic < bound


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_distributed_as_the_softmax(temperature: float) -> None:
    tokens = draws(6000, temperature=temperature)
    assert fits(tokens, (LOGITS / temperature).softmax(-1))
    assert not fits(tokens, (LOGITS / (1.3 * temperature)).softmax(-1))


def test_rows_are_independent() -> None:
    p = LOGITS.softmax(-1)
    tokens = draws(8000, temperature=1.0).view(-1, 2)
    assert fits(tokens[:, 0] * 6 + tokens[:, 1], torch.outer(p, p).flatten())


def test_a_filter_renormalises_what_it_keeps() -> None:
    p = LOGITS.softmax(-1)
    two = torch.where(torch.arange(6) < 2, p, 0)
    assert fits(draws(3000, temperature=1.0, top_k=2), two / two.sum())
    # p is .57 .21 .13 .08 ..: .57 + .21 + .13 is the first sum of .85 or more.
    three = torch.where(torch.arange(6) < 3, p, 0)
    assert fits(draws(3000, temperature=1.0, top_p=0.85), three / three.sum())
    assert set(draws(100, temperature=1.0, top_p=0.1).tolist()) == {0}
    assert set(draws(100, temperature=5.0, top_k=1).tolist()) == {0}


def test_top_p_follows_the_tokens_not_their_order() -> None:
    shuffled = torch.tensor([0.5, -3.0, 2.0, 0.0, 1.0, -1.0])
    assert set(draws(500, shuffled, temperature=1.0, top_p=0.85).tolist()) == {0, 2, 4}


def test_softcap_bends_the_logits_before_the_temperature() -> None:
    capped = 1.5 * torch.tanh(LOGITS / 1.5)
    tokens = draws(6000, temperature=0.7, softcap=1.5)
    assert fits(tokens, (capped / 0.7).softmax(-1))


def test_the_seed_decides() -> None:
    every = draws(50, temperature=1.0, seed=3)
    assert torch.equal(every, draws(50, temperature=1.0, seed=3))
    assert not torch.equal(every, draws(50, temperature=1.0, seed=4))


def test_temperature_zero_is_greedy() -> None:
    logits = torch.randn(3, 4, 9)
    assert Sampler().noise(3, 3, 9, CPU) is None
    assert torch.equal(Sampler().verify(logits, torch.zeros(3, 3), None, None), logits.argmax(-1))
    assert torch.equal(Sampler().draft(logits, None)[0], logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 1e-46, 5e-324])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.9}])
def test_the_limit_of_low_temperatures_is_greedy(temperature: float, options: Any) -> None:
    logits = torch.tensor([[3.0, 9.0, 1.0], [0.0, -1e38, 3e38], [0.0, 1e-3, -torch.inf]])
    probabilities = Sampler(temperature, **options).probabilities(logits)
    assert probabilities.tolist() == [[0, 1, 0], [0, 0, 1], [0, 1, 0]]


@pytest.mark.parametrize("temperature", [1e30, 1e39, 1e308])
def test_the_limit_of_high_temperatures_is_even(temperature: float) -> None:
    logits = torch.tensor([3.0, -9.0, -torch.inf])
    assert Sampler(temperature).probabilities(logits).tolist() == [0.5, 0.5, 0]


def test_a_draft_stands_as_often_as_the_distributions_overlap() -> None:
    p, q = LOGITS.softmax(-1), LOGITS.flip(0).softmax(-1)
    sampler = Sampler(temperature=1.0)
    noise = sampler.noise(20000, 1, 6, CPU)
    drafts, drawn_from = sampler.draft(LOGITS.flip(0).expand(20000, 1, -1), noise)
    tokens = sampler.verify(LOGITS.expand(20000, 2, -1), drafts, drawn_from, noise)
    stands = (tokens[:, :1] == drafts).float().mean()
    overlap = torch.minimum(p, q).sum()
    assert abs(stands - overlap) < 4 * (overlap * (1 - overlap) / 20000) ** 0.5


def continuations(model: Transformer, length: int, n: int, options: dict[str, Any]) -> Tensor:
    """P(t[1] .. t[length] | t[0] = 1) of plain sampling, one full forward a prefix: [V^length]."""
    vocab = model.tok_embeddings.num_embeddings
    chances = torch.ones(1)
    prefixes = [[1]]
    for _ in range(length):
        rows = [head_logits(model, [*p, *[0] * (n - 1)], n)[0, len(p) - 1] for p in prefixes]
        step = Sampler(**options).probabilities(torch.stack(rows))  # [prefixes, V]
        chances = (chances[:, None] * step).flatten()
        prefixes = [[*p, v] for p in prefixes for v in range(vocab)]
    return chances


def sampled(model: Transformer, length: int, options: dict[str, Any]) -> Tensor:
    """Which of the V^length continuations of [1] each of 6000 rows got, drafting."""
    rows = generate(model, [[1]] * 6000, length, seed=5, speculative=True, **options).tokens
    powers = model.tok_embeddings.num_embeddings ** torch.arange(length).flip(0)
    return (torch.tensor(rows) * powers).sum(-1)


SOFT: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 1.3, "top_p": 0.8},
]


def crossed(others: list[Any], usual: list[Any] = FAMILIES) -> list[Any]:
    """Each usual family with one of the others, in turn; with the rest of them exhaustively."""
    return [
        pytest.param(
            *family,
            other,
            marks=() if family in usual and i % len(others) == j else pytest.mark.exhaustive,
        )
        for i, family in enumerate(FAMILIES)
        for j, other in enumerate(others)
    ]


@pytest.mark.parametrize(("heads", "share", "options"), crossed(SOFT))
def test_drafts_do_not_change_the_distribution(
    heads: str, share: bool, options: dict[str, Any]
) -> None:
    model = random_model(heads, 3, share, vocab=4)
    assert fits(sampled(model, 4, options), continuations(model, 4, 3, options))


def keep_every_draft(
    sampler: Sampler, logits: Tensor, drafts: Tensor, q: Tensor | None, noise: Noise
) -> Tensor:
    after = draw(sampler.probabilities(logits)[:, -1:], noise.tokens[:, -1:])
    return torch.cat((drafts, after), dim=1)


def draw_again_from_p(
    sampler: Sampler, logits: Tensor, drafts: Tensor, q: Tensor | None, noise: Noise
) -> Tensor:
    right = right_rule(sampler, logits, drafts, q, noise)
    again = draw(sampler.probabilities(logits), noise.tokens)
    rejected = right[:, :-1] != drafts
    return torch.where(torch.nn.functional.pad(rejected, (0, 1)), again, right)


right_rule = Sampler.verify


@pytest.mark.parametrize(
    ("heads", "share", "wrong_rule"),
    crossed([keep_every_draft, draw_again_from_p], usual=[("parallel", False), ("medusa", False)]),
)
def test_a_wrong_rule_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch,
    heads: str,
    share: bool,
    wrong_rule: Callable[..., Tensor],
) -> None:
    model, options = random_model(heads, 3, share, vocab=4), {"temperature": 0.7}
    monkeypatch.setattr(Sampler, "verify", wrong_rule)
    assert not fits(sampled(model, 4, options), continuations(model, 4, 3, options))


def test_a_head_that_knows_what_head_1_does_is_always_right_when_sampling() -> None:
    # Without attention or feed-forward, and with tokens that all look alike, every head has
    # head 1's logits at every position.
    model = random_model("parallel", 4)
    with torch.no_grad():
        model.tok_embeddings.weight.copy_(model.tok_embeddings.weight[:1].expand(11, -1))
        for name, param in model.named_parameters():
            if name.endswith(("wo.weight", "w2.weight")):
                param.zero_()
    stats = generate(model, [[1]], 61, temperature=1.0, speculative=True).stats
    assert stats.conditional == [1, 1, 1] and stats.tokens_per_step == 4


@pytest.mark.parametrize("speculative", [False, True])
def test_a_row_with_a_seed_of_its_own_is_what_it_is_alone(speculative: bool) -> None:
    model, prompts, seeds = random_model("parallel", 4), [[1, 2, 3], [4], [5, 6], [4]], [7, 8, 9, 8]
    options: dict[str, Any] = {"temperature": 1.0, "speculative": speculative}
    rows = generate(model, prompts, 12, seed=seeds, **options).tokens
    alone = [
        generate(model, [prompt], 12, seed=seed, **options).tokens[0]
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    # While a row alone would draft fewer tokens, being nearer to its end, its draws are others.
    until = 12 - 4 if speculative else 12
    assert [row[:until] for row in rows] == [row[:until] for row in alone]
    assert rows[1] == rows[3] and len({*map(tuple, rows)}) == 3


def test_a_seed_of_a_row_that_torch_has_not() -> None:
    with pytest.raises(UserError, match=f"seed = {2**64}: "):
        Sampler(temperature=1.0, seed=[1, 2**64])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("seeds", [[], [1, 2], [1, 2, 3, 4]])
def test_seeds_are_one_or_one_a_row(seeds: list[int], temperature: float) -> None:
    with pytest.raises(UserError, match=f"^seed: found {len(seeds)}, expected 1 or 3, one a row$"):
        Sampler(temperature, seed=seeds).noise(3, 1, 5, CPU)
