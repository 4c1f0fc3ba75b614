"""Entropies of small texts by hand, and the table that sets losses beside them."""

import math

import pytest
import torch

from torchtitan_mtp.monitoring.baselines import comparison_table, skip_bigram_entropies

LN2 = math.log(2)


def naive_entropy(pairs: list[tuple[int, int]]) -> float:
    """H(Y|X) = - sum over pairs of p(x, y) * log p(y|x), straight from the definition."""
    total = 0.0
    for x, y in pairs:
        given_x = [b for a, b in pairs if a == x]
        total -= math.log(given_x.count(y) / len(given_x))
    return total / len(pairs)


def entropies(text, docs, n: int, vocab_size: int) -> list[float]:
    """Of a text whose pairs lie within documents, targets made position by position."""

    def target(i: int, k: int) -> int:
        inside = i + k < len(text) and docs[i] == docs[i + k]
        return int(text[i + k]) if inside else -100

    labels = [[target(i, k) for k in range(1, n + 1)] for i in range(len(text))]
    return skip_bigram_entropies(text, labels, vocab_size)


def test_by_hand() -> None:
    # 0 is followed by 1 or 2 with equal counts, 1 and 2 always by 0; two ahead comes the reverse.
    text = [0, 1, 0, 2, 0, 1, 0, 2, 0]
    found = entropies(text, [0] * 9, n=2, vocab_size=3)
    assert found[1] == pytest.approx(LN2 / 2)  # half the pairs start with 0
    # Two ahead 0 always meets 0, 1 meets 2 and 2 meets 1: nothing uncertain.
    assert found[2] == pytest.approx(0.0, abs=1e-12)
    p = [5 / 9, 2 / 9, 2 / 9]
    assert found[0] == pytest.approx(-sum(x * math.log(x) for x in p))


def test_equals_the_definition_on_a_random_text() -> None:
    text = torch.randint(0, 5, (200,))
    docs = (torch.arange(200) // 37).numpy()  # documents of 37 tokens
    found = entropies(text, docs, n=3, vocab_size=5)
    for k in (1, 2, 3):
        inside = [
            (int(text[i]), int(text[i + k])) for i in range(200 - k) if docs[i] == docs[i + k]
        ]
        assert found[k] == pytest.approx(naive_entropy(inside))


def test_pairs_do_not_cross_documents() -> None:
    # Inside documents every token repeats itself; only across them does one change into another.
    text, docs = [0, 0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert entropies(text, docs, 1, 2)[1] == pytest.approx(0.0, abs=1e-12)
    assert entropies(text, [0] * 9, 1, 2)[1] > 0.1


def test_a_distance_without_pairs_is_nan() -> None:
    found = entropies([3, 4], [0, 0], n=3, vocab_size=5)
    assert found[1] == 0.0
    assert math.isnan(found[2]) and math.isnan(found[3])


def test_large_vocabulary_needs_memory_for_the_pairs_only() -> None:
    vocab_size = 2**31  # a dense table of pairs would have 2**62 entries
    found = skip_bigram_entropies([7, 7], [[vocab_size - 1], [0]], vocab_size)
    assert found == [0.0, pytest.approx(LN2)]


def test_table() -> None:
    table = comparison_table(
        losses=[1.25, 2.5], accuracies=[0.625, 0.125], entropies=[3.0, 2.0, 2.25]
    )
    header, first, second, last = table.splitlines()
    assert first.split() == ["1", "t[i+1]", "1.2500", "2.0000", "yes", "62.5%"]
    assert second.split() == ["2", "t[i+2]", "2.5000", "2.2500", "no", "12.5%"]
    assert len(header) == len(first) == len(second)
    assert last.endswith("3.0000")


def test_table_refuses_lists_of_different_length() -> None:
    with pytest.raises(ValueError):
        comparison_table([1.0], [0.5, 0.5], [3.0, 2.0, 2.25])
