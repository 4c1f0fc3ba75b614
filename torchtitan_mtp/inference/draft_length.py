"""How many tokens to draft: as many as have paid for themselves lately."""

from __future__ import annotations

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
        self.checked, self.right = [0.0] * most, [0.0] * most
        self._seen = [0] * most, [0] * most  # of the statistics, at the last call of `learn`

    def next(self) -> int:
        """Drafts of the next step, 0 to most."""
        if not self.adapt:
            return self.most
        pairs = zip(self.right, self.checked, strict=True)
        rates = [(right + 1) / (checked + 1) for right, checked in pairs]
        return max(
            range(self.most + 1),
            key=lambda c: expected_tokens_per_step(rates[:c]) / (self.trunk_blocks + c),
        )

    def learn(self, stats: Stats) -> None:
        """Take in what the statistics have gained since the last call."""
        if not self.adapt:
            return
        for kept, now, before in zip(
            (self.checked, self.right), (stats.checked, stats.right), self._seen, strict=True
        ):
            kept[:] = [MEMORY * k + n - b for k, n, b in zip(kept, now, before, strict=True)]
            before[:] = now
