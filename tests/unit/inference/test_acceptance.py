"""Acceptance that is measured without drafting is what speculative decoding then gets."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import FAMILIES, head_logits, naive_greedy, random_model, scripted_model

from tests.small import small_model, small_window
from torchtitan_mtp.config import MTP
from torchtitan_mtp.data.targets import IGNORE, make_batch
from torchtitan_mtp.inference import generate
from torchtitan_mtp.inference.acceptance import (
    UNKNOWN,
    Acceptance,
    Continuation,
    count_agreement,
    count_steps,
    measure_continuation,
    own_choices,
)

PROMPTS = [[1], [0, 2, 1, 1], [2, 2], [0, 1, 2, 0, 1, 0], [2]]


def test_counts_by_hand() -> None:
    #               all right, first wrong, second wrong, third not compared, nothing compared
    drafts = torch.tensor([[1, 2, 3], [0, 2, 3], [1, 0, 3], [1, 2, 3], [4, 5, 6]])
    own = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, UNKNOWN], [UNKNOWN] * 3])
    acceptance = Acceptance(*count_agreement(drafts, own).tolist())
    assert acceptance == Acceptance([4, 4, 3], [3, 3, 3], [4, 3, 1], [3, 2, 1])
    assert acceptance.marginal == [3 / 4, 3 / 4, 1]
    assert acceptance.conditional == [3 / 4, 2 / 3, 1]
    assert acceptance.tokens_per_step == pytest.approx([1.75, 2.25, 2.75])


def test_nothing_compared_is_no_rate() -> None:
    empty = Acceptance(*count_agreement(torch.ones(0, 2), torch.ones(0, 2)).tolist())
    assert empty.drafted == [0, 0] and all(map(math.isnan, empty.conditional))


def test_own_choices_are_head_1s_where_there_is_a_target() -> None:
    model = small_model(MTP(num_future_tokens=4))
    batch = make_batch(small_window(3, 20 + 4), 4)
    with torch.no_grad():
        hiddens = model(batch)
        choices = model.output.argmax(hiddens)
        logits = torch.stack([model.output(h) for h in hiddens], dim=-1)  # [B, S, V, n]
    assert torch.equal(choices, logits.argmax(2))
    own = own_choices(choices, batch.labels)
    compared = 0
    for b in range(3):
        for i in range(20):
            for k in (2, 3, 4):
                inside = i + k - 1 < 20 and batch.labels[b, i, k - 1] != IGNORE
                expected = logits[b, i + k - 1, :, 0].argmax() if inside else UNKNOWN
                assert own[b, i, k - 2] == expected
                compared += inside
    assert 20 < compared < 3 * 20 * 3 - 20
    assert torch.equal(choices, logits.argmax(2))  # left as they were


def test_steps_by_hand() -> None:
    assert count_steps([], 3) == 0
    assert count_steps([0, 0, 0], 3) == 3
    assert count_steps([2, 0, 0, 1, 0], 3) == 2  # three tokens, then two
    assert count_steps([2, 0, 0, 1, 0], 1) == 3  # two tokens, one, two
    assert count_steps([3, 0, 0], 3) == 1  # one right draft too many


@pytest.mark.parametrize(("heads", "share"), FAMILIES)
def test_every_position_of_a_continuation_is_compared(heads: str, share: bool) -> None:
    n, count = 4, 12
    model = random_model(heads, n, share, vocab=3)
    found = measure_continuation(model, PROMPTS, count, batch_size=2).acceptance
    drafted, agreed, checked, right = ([0] * (n - 1) for _ in range(4))
    for prompt in PROMPTS:
        text = prompt + naive_greedy(model, prompt, count, n)
        choices = head_logits(model, text + [0] * (n - 1), n).argmax(-1)  # [n, S]
        for i in range(len(prompt) - 1, len(text)):
            before = True
            for k in range(2, n + 1):
                if i + k >= len(text):
                    break
                same = int(choices[k - 1, i]) == text[i + k]
                drafted[k - 2] += 1
                agreed[k - 2] += same
                checked[k - 2] += before
                before = before and same
                right[k - 2] += before
    assert found == Acceptance(drafted, agreed, checked, right)
    assert all(0 < r < d for r, d in zip(agreed, drafted, strict=True))


@pytest.mark.parametrize("eos_id", [None, 1])
@pytest.mark.parametrize(("heads", "share"), FAMILIES)
def test_tokens_a_step_are_those_of_speculative_decoding(
    heads: str, share: bool, eos_id: int | None
) -> None:
    """For every number of drafts, to the step; rows of one batch, and rows alone."""
    n, count, seen = 4, 24, set()
    for seed in range(3):
        model = random_model(heads, n, share, seed=seed, vocab=3)
        found = measure_continuation(model, PROMPTS, count, eos_id=eos_id, batch_size=3)
        for drafts in (1, 2, 3):
            options = {"speculative": True, "num_draft": drafts, "eos_id": eos_id}
            stats = generate(model, PROMPTS, count, **options).stats  # type: ignore[arg-type]
            steps = sum(row[drafts - 1] for row in found.steps)
            assert (sum(found.tokens), steps) == (stats.tokens - len(PROMPTS), stats.steps)
            if steps:
                assert found.tokens_per_step[drafts - 1] == stats.tokens_per_step
                seen.add(stats.tokens_per_step)
    assert len(seen) > 2 and max(seen) > 1.05


@pytest.mark.parametrize("heads", ["parallel", "sequential"])
def test_steps_begin_where_drafts_fail(heads: str) -> None:
    """Tokens go round 0 1 2 3; head 2 is right about one in four places, but the walk comes by it
    more often than every fourth time: the mean over positions is not what decoding gets."""
    following = [1, 2, 3, 0]
    two_on = [2, 3, 0, 1]
    last = [two_on, following][heads == "sequential"]  # from which token each family drafts
    wrong = [(token + 1) % 4 for token in last]
    drafts = [last[0], *wrong[1:]]
    model = scripted_model(heads, following, [drafts])
    found = measure_continuation(model, [[0]], 121)
    stats = generate(model, [[0]], 121, speculative=True).stats
    assert found.acceptance.tokens_per_step == [pytest.approx(1.25, abs=0.02)]
    assert found.tokens_per_step == [stats.tokens_per_step]
    assert stats.tokens_per_step == pytest.approx(4 / 3, abs=0.03)


def test_standard_errors_are_of_a_ratio() -> None:
    nothing = Acceptance([0], [0], [0], [0])
    alike = Continuation(nothing, [10, 20], [[5], [10]])
    assert alike.tokens_per_step == [2.0] and alike.standard_errors == [0.0]
    differ = Continuation(nothing, [10, 20], [[10], [5]])
    # Residuals 10 - 2 * 10 and 20 - 2 * 5, so sqrt(2 * 200) / 15.
    assert differ.standard_errors == [pytest.approx(20 / 15)]
    assert math.isnan(Continuation(nothing, [10], [[5]]).standard_errors[0])
