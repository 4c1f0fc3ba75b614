"""Choosing tokens from logits, and whether a draft may stand: greedily or at random.

Greedy. Head 1's choice is its best token; a draft stands if it is that token.

Sampled. Rejection sampling (Leviathan, Kalman and Matias 2023, arXiv 2211.17192, algorithm 1 and
appendix A.1; Chen et al. 2023, arXiv 2302.01318). With p head 1's distribution at a place and q the
one its draft d was drawn from, d stands with probability min(1, p(d) / q(d)); where it does not,
the token is drawn from max(0, p - q), normalised. Either way the token is distributed as p:

    q(d) min(1, p(d) / q(d)) + P(rejected) (p(d) - q(d))+ / sum (p - q)+
    = min(q(d), p(d)) + (p(d) - q(d))+ = p(d),

since P(rejected) = 1 - sum min(p, q) = sum (p - q)+. So the text has the distribution of plain
sampling whatever the drafts are worth; they stand as often as any rule can let them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from torchtitan_mtp.errors import UserError


class Noise(NamedTuple):
    """What is random in a step with m drafts, drawn before it: compiled code draws nothing. An
    exponential clock a token, of its weight's rate: the first to ring wins. Unlike
    torch.multinomial that does not wait for the device, and weights need no sum."""

    drafts: Tensor  # [B, m, V] clocks of rate 1, > 0
    tokens: Tensor  # [B, m + 1, V] the same
    stands: Tensor  # [B, m] in [0, 1)


def draw(weights: Tensor, clocks: Tensor) -> Tensor:
    """Tokens [...], each with a probability in proportion to its weight, of [..., V]."""
    return (weights / clocks).argmax(-1)


@dataclass
class Sampler:
    """Greedy at temperature 0, else samples from the softmax of logits / temperature.

    top_k: among the k most likely tokens. top_p: among the most likely tokens that together have
    at least this probability (Holtzman et al. 2020, arXiv 1904.09751), after top_k. softcap: as in
    training, logits are softcap * tanh(logits / softcap). All of them for drafts as for head 1.
    seed: of all rows, or one of each, of which a row's samples then depend on its own alone.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | Sequence[int] = 0
    softcap: float | None = None
    _generators: list[torch.Generator] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature = {self.temperature}: expected 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k = {self.top_k}: expected 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p}: expected more than 0, at most 1")
        self._seeds = [self.seed] if isinstance(self.seed, int) else list(self.seed)
        for seed in self._seeds:
            if not -(2**63) <= seed < 2**64:  # torch's
                raise UserError(f"seed = {seed}: expected at most {2**64 - 1}")

    def noise(self, batch: int, drafts: int, vocab: int, device: torch.device) -> Noise | None:
        """For a step of `batch` rows with `drafts` drafts each; None when greedy. Error: not one
        seed, nor one a row."""
        if len(self._seeds) not in (1, batch):
            raise UserError(f"seed: found {len(self._seeds)}, expected 1 or {batch}, one a row")
        if self.temperature == 0:
            return None
        if not self._generators:
            self._generators = [torch.Generator(device).manual_seed(seed) for seed in self._seeds]
        clocks = torch.empty(batch, 2 * drafts + 1, vocab, device=device)
        stands = torch.empty(batch, drafts, device=device)
        rows = batch // len(self._generators)
        for generator, *of_rows in zip(
            self._generators, clocks.split(rows), stands.split(rows), strict=True
        ):
            of_rows[0].exponential_(generator=generator)
            of_rows[1].uniform_(generator=generator)
        clocks.clamp_(min=torch.finfo(clocks.dtype).tiny)
        return Noise(clocks[:, :drafts], clocks[:, drafts:], stands)

    def draft(
        self, logits: Tensor, noise: Noise | None, first: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Drafts [B, j] and what they were drawn from [B, j, V], from heads' logits [B, j, V],
        after the `first` drafts of this step."""
        if noise is None:
            return logits.argmax(-1), None
        q = self.probabilities(logits)
        return draw(q, noise.drafts[:, first : first + q.shape[1]]), q

    def verify(
        self, logits: Tensor, drafts: Tensor, q: Tensor | None, noise: Noise | None
    ) -> Tensor:
        """The tokens [B, m + 1] of m places with drafts [B, m] and the one after, from head 1.

        logits: [B, m + 1, V]. A draft stands where its token is here again; what comes after the
        first place where it does not is of no account. q: [B, m, V], what the drafts were drawn
        from; None without drafts, or when greedy.
        """
        if noise is None:
            return logits.argmax(-1)
        p = self.probabilities(logits)
        after = draw(p[:, -1:], noise.tokens[:, -1:])
        if q is None:
            return after
        p, at = p[:, :-1], drafts.unsqueeze(-1)  # [B, m, V], [B, m, 1]
        chance = noise.stands * q.gather(-1, at).squeeze(-1)
        stands = chance < p.gather(-1, at).squeeze(-1)
        rest = (p - q).clamp(min=0)
        # All zero where p and q differ by rounding alone: p then, as good as never.
        rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)
        instead = draw(rest, noise.tokens[:, :-1])
        return torch.cat((torch.where(stands, drafts, instead), after), dim=1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """What is sampled from: [..., V] float32, from logits [..., V]."""
        logits = logits.float()
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        # Where the best is 0, none overflows, and the limit of low temperatures is greedy. Beyond
        # these the temperature or its inverse would be 0 or infinite in float32, or not normal.
        tiny = torch.finfo(torch.float32).tiny
        temperature = min(max(self.temperature, tiny), 1 / tiny)
        logits = (logits - logits.amax(-1, keepdim=True)) / temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True)
            probs = ordered.softmax(-1)
            outside = probs.cumsum(-1) - probs >= self.top_p  # the mass before it suffices
            logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
        return logits.softmax(-1)
