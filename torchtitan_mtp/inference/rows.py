"""The text of each row as the host sees it: what was accepted, what ends it, what it counted."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torchtitan_mtp.inference.stats import Stats
from torchtitan_mtp.inference.text_stream import TextStream

EndIds = int | Collection[int] | None  # each of them ends a row


class Step(NamedTuple):
    """What a step did to a row: `drafts`, of heads 2, 3, ..., for the row's new tokens from `place`
    on; the first `accepted` were right, and head 1's choice comes after these. A row may end in the
    midst of them."""

    place: int
    drafts: list[int]
    accepted: int


@dataclass(frozen=True)
class Generation:
    """What `generate` gives.

    Attributes:
        tokens: of each row, the new ones only, eos included where it ended the row.
        stats: counts over all rows.
        steps: of each row, those after the prompt's forward, which gave the first token.
    """

    tokens: list[list[int]]
    stats: Stats
    steps: list[list[Step]]


class Rows:
    """The new tokens of every row, at most `max_new_tokens` each, up to and with the first that is
    `eos_id`, or one of them, or completes a stop string of the row's text, where there is one."""

    def __init__(
        self,
        batch: int,
        max_new_tokens: int,
        eos_id: EndIds,
        num_draft: int,
        texts: Sequence[TextStream] = (),
    ) -> None:
        self.ends = {eos_id} if isinstance(eos_id, int) else set(eos_id or ())
        self.texts = texts
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.room = [max_new_tokens] * batch  # how many more each may get; 0 when it is finished
        drafted, agreed, checked, right = ([0] * num_draft for _ in range(4))
        self.stats = Stats(drafted, agreed, checked, right, first_tokens=batch)
        self.steps: list[list[Step]] = [[] for _ in range(batch)]

    def left(self) -> int:
        """How many tokens the row that needs most may still get; 0 when all are finished."""
        return max(self.room)

    def start(self, target: list[list[int]]) -> None:
        """Take the first token of every row from head 1's choices after the prompts [B][1]."""
        self.stats.forwards += 1
        for row, choices in enumerate(target):
            self._take(row, choices)

    def accept(self, fed: list[list[int]], target: list[list[int]]) -> list[int]:
        """Take what a step yields, and say by how many positions each row has grown: fed, the last
        token of the text and the drafts after it; target, head 1's choices [B][1 + count] each."""
        self.stats.forwards += 1
        grown = [0] * len(self.tokens)
        for row, ((_, *drafts), choices) in enumerate(zip(fed, target, strict=True)):
            if self.room[row]:
                pairs = enumerate(zip(drafts, choices, strict=False))
                accepted = next((a for a, (draft, t) in pairs if draft != t), len(drafts))
                self.stats.count_step(len(drafts), accepted)
                place = len(self.tokens[row])
                self.steps[row].append(Step(place, drafts, accepted))
                self._take(row, choices[: accepted + 1])
                grown[row] = len(self.tokens[row]) - place
        return grown

    def _take(self, row: int, tokens: list[int]) -> None:
        """Give a row those of the tokens that it has room for, up to what ends it."""
        for token in tokens[: self.room[row]]:
            self.tokens[row].append(token)
            self.room[row] -= 1
            if token in self.ends or (self.texts and self.texts[row].add(token)):
                self.room[row] = 0
                break

    def finish(self, prompt_seconds: float, seconds: float) -> Generation:
        """The texts and the counts, with the seconds to the first tokens and in all."""
        for tokens, steps in zip(self.tokens, self.steps, strict=True):
            for place, drafts, _ in steps:
                self.stats.count_drafts(drafts, tokens[place:])
        self.stats.tokens = sum(map(len, self.tokens))
        self.stats.prompt_seconds, self.stats.seconds = prompt_seconds, seconds
        return Generation(self.tokens, self.stats, self.steps)
