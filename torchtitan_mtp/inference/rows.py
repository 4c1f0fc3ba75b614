"""The text of each row as the host sees it: what was accepted, what ends it, what it counted."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torchtitan_mtp.inference.stats import Stats

EndIds = int | Collection[int] | None  # each of them ends a row


@dataclass(frozen=True)
class Generation:
    """tokens: of each row, the new ones only, eos included where it ended the row."""

    tokens: list[list[int]]
    stats: Stats


def accepted_drafts(drafts: Sequence[int], target: Sequence[int]) -> int:
    """How many of the drafts, from the first on, are what head 1 chose in their place."""
    for a, (draft, token) in enumerate(zip(drafts, target, strict=False)):
        if draft != token:
            return a
    return len(drafts)


class Rows:
    """The new tokens of every row, at most `max_new_tokens` each, up to and with the first that is
    `eos_id`, or one of them."""

    def __init__(self, batch: int, max_new_tokens: int, eos_id: EndIds, num_draft: int) -> None:
        self.max_new_tokens = max_new_tokens
        self.ends = {eos_id} if isinstance(eos_id, int) else set(eos_id or ())
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        drafted, agreed, checked, right = ([0] * num_draft for _ in range(4))
        self.stats = Stats(drafted, agreed, checked, right, first_tokens=batch)
        self._drafts: list[tuple[int, int, list[int]]] = []  # row, place in its text, drafts

    def left(self) -> int:
        """How many tokens the row that needs most may still get; 0 when all are finished."""
        return max(self._left(text) for text in self.tokens)

    def _left(self, text: list[int]) -> int:
        ended = text and text[-1] in self.ends
        return 0 if ended else self.max_new_tokens - len(text)

    def start(self, target: list[list[int]]) -> None:
        """Take the first token of every row from head 1's choices after the prompts [B][1]."""
        self.stats.forwards += 1
        for text, choices in zip(self.tokens, target, strict=True):
            text += choices

    def accept(self, fed: list[list[int]], target: list[list[int]]) -> list[int]:
        """Take what a step yields, and say by how many positions each row has grown.

        fed: [B][1 + count], the last token of the text and the drafts after it. target: [B][1 +
        count], head 1's choice after each of these.
        """
        self.stats.forwards += 1
        grown = []
        for row, (text, (_, *drafts), choices) in enumerate(
            zip(self.tokens, fed, target, strict=True)
        ):
            left = self._left(text)
            if left == 0:
                grown.append(0)
                continue
            accepted = accepted_drafts(drafts, choices)
            self.stats.count_step(len(drafts), accepted)
            self._drafts.append((row, len(text), drafts))
            new = choices[: min(accepted + 1, left)]
            end = next((i for i, token in enumerate(new, 1) if token in self.ends), None)
            new = new[:end]
            text += new
            grown.append(len(new))
        return grown

    def finish(self, prompt_seconds: float, seconds: float) -> Generation:
        """The texts and the counts, with the seconds to the first tokens and in all."""
        for row, place, drafts in self._drafts:
            self.stats.count_drafts(drafts, self.tokens[row][place:])
        self.stats.tokens = sum(map(len, self.tokens))
        self.stats.prompt_seconds, self.stats.seconds = prompt_seconds, seconds
        return Generation(self.tokens, self.stats)
