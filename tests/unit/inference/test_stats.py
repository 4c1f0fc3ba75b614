"""The arithmetic of acceptance, on counts made by hand."""

from __future__ import annotations

import math

import pytest

from torchtitan_mtp.inference.rows import Rows
from torchtitan_mtp.inference.stats import Stats, expected_tokens_per_step


@pytest.mark.parametrize(
    ("drafts", "target", "accepted"),
    [
        ([], [7], 0),
        ([7, 8, 9], [7, 8, 9, 1], 3),
        ([7, 8, 9], [7, 1, 9, 1], 1),
        ([7, 8, 9], [1, 8, 9, 1], 0),
    ],
)
def test_the_longest_right_prefix_is_accepted(
    drafts: list[int], target: list[int], accepted: int
) -> None:
    rows = Rows(1, 9, None, 3)
    rows.start([[5]])
    assert rows.accept([[5, *drafts]], [target]) == [accepted + 1]
    assert rows.tokens == [[5, *target[: accepted + 1]]]


def test_conditional_counts_only_what_was_reached() -> None:
    stats = Stats(checked=[0] * 3, right=[0] * 3)
    for accepted in (0, 1, 1, 3):
        stats.count_step(3, accepted)
    stats.count_step(1, 1)  # the last step of a text may draft fewer
    assert stats.checked == [5, 4 - 1, 1] and stats.right == [4, 1, 1]
    assert stats.conditional == [0.8, 1 / 3, 1.0]
    expected = expected_tokens_per_step(stats.conditional)
    assert expected == pytest.approx(1 + 0.8 + 0.8 / 3 + 0.8 / 3)


def test_expected_tokens_per_step() -> None:
    assert expected_tokens_per_step([]) == 1
    assert expected_tokens_per_step([0.5, 0.5]) == 1.75
    assert expected_tokens_per_step([0.0, 1.0]) == 1
    assert expected_tokens_per_step([0.5, 0.0, math.nan]) == 1.5  # nothing got as far as head 4


def test_rows_count_by_hand() -> None:
    rows = Rows(2, max_new_tokens=6, eos_id=9, num_draft=2)
    rows.start([[1], [5]])
    assert rows.left() == 5
    # Row 0: both drafts right. Row 1: the first is wrong, the second would have been right.
    grown = rows.accept([[1, 2, 3], [5, 0, 7]], [[2, 3, 4], [6, 8, 8]])
    assert grown == [3, 1] and rows.tokens == [[1, 2, 3, 4], [5, 6]]
    # Row 0 gets two of three tokens; row 1 ends with eos, the first of its accepted ones.
    grown = rows.accept([[4, 5, 6], [6, 9, 9]], [[5, 6, 7], [9, 9, 9]])
    assert grown == [2, 1] and rows.left() == 0
    stats = rows.finish(1.0, 3.0).stats
    assert rows.tokens == [[1, 2, 3, 4, 5, 6], [5, 6, 9]]
    assert (stats.tokens, stats.steps, stats.forwards) == (9, 4, 3)
    assert stats.tokens_per_step == 7 / 4
    assert stats.tokens_per_second == 7 / 2
    assert stats.checked == [4, 3] and stats.right == [3, 3]
    # Drafts for places that the text has: row 0's four, row 1's 0 (6 there), 7 (9 there), 9.
    assert stats.drafted == [4, 3] and stats.agreed == [3, 2]


def test_a_finished_row_stays_as_it_is() -> None:
    rows = Rows(2, max_new_tokens=4, eos_id=9, num_draft=1)
    rows.start([[9], [1]])
    assert rows.accept([[9, 0], [1, 2]], [[0, 0], [2, 3]]) == [0, 2]
    assert rows.tokens == [[9], [1, 2, 3]] and rows.stats.steps == 1


def test_nothing_drafted_is_no_rate() -> None:
    stats = Stats(tokens=1, first_tokens=1, checked=[0], right=[0], drafted=[0], agreed=[0])
    assert math.isnan(stats.tokens_per_step) and math.isnan(stats.conditional[0])
