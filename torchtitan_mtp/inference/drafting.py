"""How heads 2..n propose the tokens after the next one, from caches of their own.

After the trunk has run up to position p, tokens t[0] .. t[p+1] are known (t[p+1] from head 1), and
head k at position p proposes t[p+k]. To do so it attends over its own keys and values of positions
0..p; this file is about keeping those what a forward over the whole text would make them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from torchtitan_mtp.inference.cache import LayerCache, Positions, Span, shifted, take
from torchtitan_mtp.inference.sampling import Sampler
from torchtitan_mtp.inference.stacking import stack
from torchtitan_mtp.models.transformer import Transformer


class TrunkStates(NamedTuple):
    """What the trunk computed at the positions of a span.

    z: [B, size, D], under its last layer. h: [B, size, D], head 1's hidden state.
    """

    z: Tensor
    h: Tensor


class ParallelDrafter:
    """Heads 2..n beside the last layer (Gloeckle et al. 2024): all drafts at once from z.

    A head's keys at position i depend on t[0..i] alone, so the entries of accepted positions are
    right for good, and each step adds those of its own.
    """

    def __init__(self, model: Transformer, positions: Positions, num_draft: int) -> None:
        self.model, self.positions = model, positions
        self.heads = num_draft
        self.block = stack(model.mtp.head_blocks(model)[1 : num_draft + 1])
        # The heads are rows of one batch: head 2's rows, head 3's rows, ...
        self.rows = positions.repeat(num_draft)
        self.cache = LayerCache(self.block.attention, self.rows)

    def draft(
        self,
        tokens: Tensor,
        states: TrunkStates,
        span: Span,
        last: Sequence[int],
        count: int,
        sampler: Sampler,
    ) -> None:
        """Write drafts for t[p+2] .. t[p+1+count] into tokens [B, >= max_len], p = last[b].

        states: the trunk's at `span`, which holds p and every position new since the last call.
        """
        columns, heads = span.columns(last), self.heads
        size = max(columns) + 1  # the heads never run over a rejected draft, but to fill a batch
        span = self.rows.span(span.starts * heads, size)
        z = states.z[:, :size].repeat(heads, 1, 1)  # [H * B, size, D]
        h = take(self.block(z, span.context, self.cache.at(span)), columns * heads)
        h = self.model.norm(h).view(heads, len(last), -1).transpose(0, 1)  # [B, H, D]
        drafts = sampler.draft(self.model.output(h[:, :count]))  # [B, count]
        tokens[self.positions.index([p + 2 for p in last], count)] = drafts


class SequentialDrafter:
    """A chain of modules (DeepSeek-V3): each draft is made with the drafts before it.

    Module k at position i takes emb(t[i+k-1]) and h_{k-1}[i]. At position p, t[p+1] is known and
    t[p+2] .. are the drafts just made, so the entries of module k at positions p+3-k .. p rest on
    drafts, and go stale when one is rejected. With p' > p the next time, nothing before
    p'+2-k is ever stale. Every module therefore runs over one window that ends at p': the new
    positions, and at least as many as there are modules (for n = 2, the new positions alone).
    """

    def __init__(self, model: Transformer, positions: Positions, num_draft: int) -> None:
        self.model, self.positions = model, positions
        # A cache a depth, not a module: a shared module has one for each time it is applied.
        modules = [model.mtp.module(k) for k in range(2, num_draft + 2)]
        self.caches = [LayerCache(m.block.attention, positions) for m in modules]
        weight = model.norm.weight
        self.h = weight.new_zeros(positions.batch, positions.max_len, len(weight))  # h_1

    def draft(
        self,
        tokens: Tensor,
        states: TrunkStates,
        span: Span,
        last: Sequence[int],
        count: int,
        sampler: Sampler,
    ) -> None:
        """As `ParallelDrafter.draft`."""
        self.h[span.where] = states.h
        size = max(1 + max(span.columns(last)), len(self.caches))
        window = self.positions.span([max(0, p + 1 - size) for p in last], size)
        columns = window.columns(last)
        h = self.h[window.where]  # [B, size, D]
        for k, cache in enumerate(self.caches[:count], start=2):
            emb = self.model.tok_embeddings(tokens[shifted(window.where, k - 1)])
            h = self.model.mtp.module(k)(h, emb, window.context, cache.at(window))
            drafts = sampler.draft(self.model.output(take(h, columns)))  # [B, 1]
            tokens[self.positions.index([p + k for p in last], 1)] = drafts


Drafter = ParallelDrafter | SequentialDrafter


def build_drafter(model: Transformer, positions: Positions, num_draft: int) -> Drafter:
    """What drafts up to `num_draft` tokens a step with the model's family of heads."""
    parallel = model.mtp.family == "parallel"
    return (ParallelDrafter if parallel else SequentialDrafter)(model, positions, num_draft)
