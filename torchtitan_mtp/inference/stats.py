"""What a generation cost, and how often each head was right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class DraftCounts:
    """How often drafts were right. One entry a drafting head, 2, 3, ...

    Attributes:
        drafted: how often a draft of head k had something to be compared with.
        agreed: how often it was the same.
        checked: `drafted` where the drafts of heads 2..k-1 were right.
        right: `agreed` there.
    """

    drafted: list[int] = field(default_factory=list)
    agreed: list[int] = field(default_factory=list)
    checked: list[int] = field(default_factory=list)
    right: list[int] = field(default_factory=list)

    @property
    def marginal(self) -> list[float]:
        """P(head k right), of heads 2, 3, ..."""
        return list(map(ratio, self.agreed, self.drafted))

    @property
    def conditional(self) -> list[float]:
        """a_k = P(head k right | heads 2..k-1 right), of heads 2, 3, ..."""
        return list(map(ratio, self.right, self.checked))


@dataclass
class Stats(DraftCounts):
    """Counts over all rows of a generation.

    A draft is drafted where the text reached its place in the end (after a token that head 1 had to
    correct, or after all drafts were right), and checked where head 1 was asked about it.

    Attributes:
        tokens: generated, over all rows.
        steps: (row, forward) pairs after the prompt's forward, while the row was not finished.
        forwards: of the trunk, the prompt's included.
        seconds: of the whole generation.
        prompt_seconds: of these, until each row's first token.
        first_tokens: how many came of the prompt's forward, one a row.
    """

    tokens: int = 0
    steps: int = 0
    forwards: int = 0
    seconds: float = 0.0
    prompt_seconds: float = 0.0
    first_tokens: int = 0

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a forward yields to a row; 1 without drafts."""
        return ratio(self.tokens - self.first_tokens, self.steps)

    @property
    def tokens_per_second(self) -> float:
        """After the prompt's forward."""
        return ratio(self.tokens - self.first_tokens, self.seconds - self.prompt_seconds)

    def count_step(self, drafts: int, accepted: int) -> None:
        """A step of one row that fed `drafts` drafts, of which the first `accepted` were right."""
        self.steps += 1
        for j in range(drafts):
            self.checked[j] += accepted >= j
            self.right[j] += accepted > j

    def count_drafts(self, drafts: Sequence[int], text: Sequence[int]) -> None:
        """Compare drafts with what the text has at their places, as far as it goes."""
        for j, (draft, token) in enumerate(zip(drafts, text, strict=False)):
            self.drafted[j] += 1
            self.agreed[j] += draft == token


def expected_tokens_per_step(conditional: Sequence[float]) -> float:
    """1 + sum_k prod_{j <= k} a_j, a_j = P(head j right | heads 2..j-1 right)."""
    expected = product = 1.0
    for a in conditional:
        if product == 0:  # what comes after was never compared with anything
            break
        product *= a
        expected += product
    return expected


def ratio(part: float, whole: float) -> float:
    """part / whole, or nan of nothing."""
    return part / whole if whole else float("nan")
