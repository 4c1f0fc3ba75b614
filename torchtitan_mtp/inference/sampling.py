"""Choosing a token from logits so that the same text comes out however it is computed.

Sampling is done by the Gumbel-max trick: with independent g_v = -log(-log(u_v)),

    argmax_v(logit_v + g_v)  is distributed as  softmax(logits).

The noise g of a position is a function of (seed, row, position) and nothing else. A draft for that
position and head 1's own choice there are made with the same noise, so that a head whose
distribution is like head 1's mostly chooses the same token, and verification asks what it asks
in greedy decoding: are they equal? (Daliri, Musco and Suresh 2024, arXiv 2408.07978, "drafter-
invariant speculative decoding".) The tokens that come out are head 1's choices whatever was
drafted: not only the distribution of plain sampling, but its very tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchtitan_mtp.errors import UserError


@dataclass(frozen=True)
class Sampler:
    """Greedy at temperature 0, else samples from the softmax of logits / temperature.

    top_k: among the k most likely tokens. top_p: among the most likely tokens that together have
    at least this probability (Holtzman et al. 2020, arXiv 1904.09751), after top_k. softcap: as in
    training, logits are softcap * tanh(logits / softcap).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature = {self.temperature}: expected 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k = {self.top_k}: expected 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p}: expected more than 0, at most 1")

    def __call__(self, logits: Tensor, starts: Sequence[int]) -> Tensor:
        """Tokens [B, m] for the m positions from `starts[b]` on, from logits [B, m, V]."""
        if self.temperature == 0:
            return logits.argmax(-1)
        noise = torch.stack(
            [
                torch.stack([self._gumbel(logits, row, start + j) for j in range(logits.shape[1])])
                for row, start in enumerate(starts)
            ]
        )  # [B, m, V]
        return (self._warp(logits.float()) + noise).argmax(-1)

    def _warp(self, logits: Tensor) -> Tensor:
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
        return logits

    def _gumbel(self, logits: Tensor, row: int, position: int) -> Tensor:
        """The noise of one position, [V] float32."""
        digest = hashlib.sha256(f"{self.seed}/{row}/{position}".encode()).digest()
        seed = int.from_bytes(digest[:7], "big")
        generator = torch.Generator(logits.device).manual_seed(seed)
        noise = torch.empty(logits.shape[-1], device=logits.device)
        return -noise.exponential_(generator=generator).log()
