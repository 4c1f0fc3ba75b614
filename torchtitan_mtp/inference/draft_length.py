"""How many tokens to draft: as many as have paid for themselves lately."""

from __future__ import annotations

import numpy as np

from torchtitan_mtp.inference.stats import Stats, expected_tokens_per_step

MEMORY = 0.97  # a step counts half as much 23 steps later


class DraftLength:
    """Chooses the number of drafts c of the next step: fixed, or the best tokens for their cost.

    A step with c drafts yields 1 + sum_{j <= c} prod_{i <= j} a_i tokens, a_i = P(draft i right |
    those before right), and costs about as much as `trunk_blocks` + c blocks: the trunk is bound by
    its weights, not by how many tokens it verifies. a_i is what was seen, with one imagined success
    beside it; as memories fade that one gains, and a head given up is tried again.
    """

    def __init__(self, most: int, trunk_blocks: int, adapt: bool) -> None:
        self.most, self.trunk_blocks, self.adapt = most, trunk_blocks, adapt
        # Of right and of checked drafts, what was seen in all and what is remembered of it.
        self._seen = self._memory = np.zeros((2, most))

    def next(self) -> int:
        """Drafts of the next step, 0 to most."""
        if not self.adapt:
            return self.most
        right, checked = self._memory + 1
        rates = (right / checked).tolist()
        return max(
            range(self.most + 1),
            key=lambda c: expected_tokens_per_step(rates[:c]) / (self.trunk_blocks + c),
        )

    def learn(self, stats: Stats) -> None:
        """Take in what the statistics have gained since the last call."""
        seen = np.array([stats.right, stats.checked])
        self._memory = MEMORY * self._memory + seen - self._seen
        self._seen = seen
