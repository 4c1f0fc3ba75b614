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

from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchtitan_mtp.errors import UserError


@dataclass
class Sampler:
    """Greedy at temperature 0, else samples from the softmax of logits / temperature.

    top_k: among the k most likely tokens. top_p: among the most likely tokens that together have
    at least this probability (Holtzman et al. 2020, arXiv 1904.09751), after top_k. softcap: as in
    training, logits are softcap * tanh(logits / softcap). All of them for drafts as for head 1.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    softcap: float | None = None
    # What the drafts of this step were drawn from, [B, m, V] each, until they are verified.
    _drafted: list[Tensor] = field(default_factory=list, init=False)
    _generator: torch.Generator | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature = {self.temperature}: expected 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k = {self.top_k}: expected 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p}: expected more than 0, at most 1")

    def draft(self, logits: Tensor) -> Tensor:
        """Drafts [B, m] from the logits [B, m, V] of drafting heads."""
        if self.temperature == 0:
            return logits.argmax(-1)
        q = self.probabilities(logits)
        self._drafted.append(q)
        return self._draw(q)

    def verify(self, logits: Tensor, drafts: Tensor) -> Tensor:
        """The tokens [B, m + 1] of m places with drafts [B, m] and the one after, from head 1.

        logits: [B, m + 1, V]. A draft stands where its token is here again; what comes after the
        first place where it does not is of no account. The drafts are those of `draft` since the
        last call.
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        p = self.probabilities(logits)
        after = self._draw(p[:, -1:])
        if not drafts.shape[1]:
            return after
        q = torch.cat(self._drafted, dim=1)  # [B, m, V]
        self._drafted.clear()
        p, at = p[:, :-1], drafts.unsqueeze(-1)  # [B, m, V], [B, m, 1]
        u = torch.rand(drafts.shape, device=p.device, generator=self._noise(p))  # [0, 1)
        stands = u * q.gather(-1, at).squeeze(-1) < p.gather(-1, at).squeeze(-1)
        rest = (p - q).clamp(min=0)
        # All zero where p and q differ by rounding alone: p then, as good as never.
        instead = self._draw(torch.where(rest.sum(-1, keepdim=True) > 0, rest, p))
        return torch.cat((torch.where(stands, drafts, instead), after), dim=1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """What is sampled from: [..., V] float32, from logits [..., V]."""
        logits = logits.float()
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True)
            probs = ordered.softmax(-1)
            outside = probs.cumsum(-1) - probs >= self.top_p  # the mass before it suffices
            logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
        return logits.softmax(-1)

    def _draw(self, weights: Tensor) -> Tensor:
        """Tokens [...], each with a probability in proportion to its weight, of [..., V].

        An exponential clock a token, of its weight's rate: the first to ring wins. Unlike
        torch.multinomial it does not wait for the device, and weights need no sum.
        """
        clocks = torch.empty_like(weights).exponential_(generator=self._noise(weights))
        return (weights / clocks.clamp_(min=torch.finfo(clocks.dtype).tiny)).argmax(-1)

    def _noise(self, like: Tensor) -> torch.Generator:
        if self._generator is None:
            self._generator = torch.Generator(like.device).manual_seed(self.seed)
        return self._generator
