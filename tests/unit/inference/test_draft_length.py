"""The number of drafts follows what they were worth."""

from __future__ import annotations

from torchtitan_mtp.inference.draft_length import DraftLength
from torchtitan_mtp.inference.stats import Stats


def lengths(steps: int, trunk_blocks: int, right: list[bool], most: int = 3) -> list[int]:
    """The numbers chosen when head j + 2 is always right or always wrong."""
    length, chosen = DraftLength(most, trunk_blocks, adapt=True), []
    stats = Stats(checked=[0] * most, right=[0] * most)
    for _ in range(steps):
        chosen.append(length.next())
        accepted = 0
        while accepted < chosen[-1] and right[accepted]:
            accepted += 1
        stats.count_step(chosen[-1], accepted)
        length.learn(stats)
    return chosen


def test_heads_that_are_right_all_draft() -> None:
    assert lengths(50, 4, [True] * 3) == [3] * 50


def test_a_head_that_is_wrong_is_given_up_and_tried_again() -> None:
    chosen = lengths(400, 4, [True, False, True])
    assert chosen[0] == 3
    assert chosen[20:].count(1) > 0.8 * 380  # head 2 alone
    assert max(chosen[200:]) > 1  # at times the others


def test_heads_that_are_all_wrong_leave_plain_decoding() -> None:
    assert lengths(400, 4, [False] * 3)[20:].count(0) > 0.8 * 380


def test_under_a_deeper_trunk_a_head_may_be_wrong_more_often() -> None:
    def share(trunk_blocks: int) -> float:
        length = DraftLength(1, trunk_blocks, adapt=True)
        stats, drafted = Stats(checked=[0], right=[0]), 0
        for step in range(400):
            count = length.next()
            drafted += count
            stats.count_step(count, int(step % 5 == 0))  # right in a fifth of the steps
            length.learn(stats)
        return drafted / 400

    assert share(2) < 0.5 < 0.95 < share(32)


def test_a_fixed_number_stays() -> None:
    length = DraftLength(3, 4, adapt=False)
    length.learn(Stats(checked=[9, 9, 9], right=[0, 0, 0]))
    assert length.next() == 3
