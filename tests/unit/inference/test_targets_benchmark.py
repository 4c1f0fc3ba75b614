"""The figures of `scripts/benchmark.py targets`: rates, their spread, and differences of two."""

from __future__ import annotations

import pytest
from benchmarks.targets import Decoded, rate_and_spread, standard_error, table

from torchtitan_mtp.inference.acceptance import Acceptance, Continuation


def test_differences_are_taken_prompt_by_prompt() -> None:
    """By hand: 12 tokens in 5 steps, of which the prompts have 2 and 3; and in 6, of 3 and 3."""
    kl, labels = Decoded([6, 6], [2, 3], [0.5, 0.25]), Decoded([6, 6], [3, 3], [0.5, 0.0])
    rate, spread = rate_and_spread(kl)
    assert rate == pytest.approx(2.4)
    assert spread == pytest.approx([0.48, -0.48])  # (6 - 2.4 * steps) / 2.5
    found = table({("greedy", "kl"): kl, ("greedy", "labels"): labels})
    assert found[0] == {
        "decoding": "greedy",
        "heads learn from": "kl",
        "head 2 right": "50.0%",
        "head 3 right": "25.0%",
        "tokens/step": pytest.approx(2.4),
        "±": pytest.approx(0.48),
        "more than labels (95%)": "-0.541 to +1.341",  # 0.4 -+ 1.96 * 0.48
    }
    assert found[1]["tokens/step"] == 2 and found[1]["more than labels (95%)"] == ""


def test_standard_error_is_that_of_evaluate() -> None:
    tokens, steps = [9, 12, 5], [[4], [6], [5]]
    own = Continuation(Acceptance(), tokens, steps)
    rate, spread = rate_and_spread(Decoded(tokens, [4, 6, 5], []))
    assert rate == pytest.approx(own.tokens_per_step[0])
    assert standard_error(spread) == pytest.approx(own.standard_errors[0])
