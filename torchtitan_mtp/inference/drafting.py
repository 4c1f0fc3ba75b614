"""How heads 2..n propose the tokens after the next one, from caches of their own.

After the trunk has run up to position p, tokens t[0] .. t[p+1] are known (t[p+1] from head 1), and
head k at position p proposes t[p+k]. To do so it attends over its own keys and values of positions
0..p; this file is about keeping those what a forward over the whole text would make them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchtitan_mtp.inference.cache import LayerCache, Positions, Span, shifted, take
from torchtitan_mtp.inference.running import Runner
from torchtitan_mtp.inference.sampling import Sampler
from torchtitan_mtp.inference.stacking import first_heads, stack
from torchtitan_mtp.models.transformer import Transformer


class TrunkStates(NamedTuple):
    """What the trunk computed at the positions of a span.

    z: [B, size, D], under its last layer. h: [B, size, D], head 1's hidden state.
    """

    z: Tensor
    h: Tensor


class Windows:
    """Which positions each head has yet to run over.

    A step may leave heads out, and what a head kept may rest on drafts (its last `lags[j]`
    positions, once the row has grown): a head runs again from where its entries stop being those
    of the text.
    """

    def __init__(self, positions: Positions, lags: Sequence[int]) -> None:
        self.positions, self.lags = positions, lags
        self.right = [[0] * positions.batch for _ in lags]  # entries before this one are right

    def next(self, last: Sequence[int], count: int) -> Span:
        """One span that ends at p = last[b] and has all that the first `count` heads lack."""
        for lag, right in zip(self.lags, self.right, strict=True):
            right[:] = [max(0, min(r, p + 1 - lag)) for r, p in zip(right, last, strict=True)]
        lacking = [p + 1 - r for row in self.right[:count] for r, p in zip(row, last, strict=True)]
        size = self.positions.padded(max(1, *lacking))
        for right in self.right[:count]:
            right[:] = [p + 1 for p in last]
        return self.positions.span([max(0, p + 1 - size) for p in last], size)


class ParallelDrafter:
    """Heads 2..n beside the last layer (Gloeckle et al. 2024): all drafts at once from z.

    A head's keys at position i depend on t[0..i] alone, so the entries of accepted positions are
    right for good, and each step adds those of its own.
    """

    def __init__(self, model: Transformer, positions: Positions, num_draft: int) -> None:
        self.model, self.positions = model, positions
        self.windows = Windows(positions, [0] * num_draft)
        block = stack(model.mtp.head_blocks(model)[1 : num_draft + 1])
        # The heads are rows of one batch: head 2's rows, head 3's rows, ...
        self.heads = {
            count: (first_heads(block, count), positions.repeat(count))
            for count in range(1, num_draft + 1)
        }
        self.cache = LayerCache(block.attention, positions.repeat(num_draft))
        self.z = positions.states(len(model.norm.weight))

    def store(self, states: TrunkStates, span: Span) -> None:
        """Keep what the trunk computed at `span`."""
        self.z[span.where] = states.z

    def draft(
        self, tokens: Tensor, last: Sequence[int], count: int, sampler: Sampler, run: Runner
    ) -> None:
        """Write drafts for t[p+2] .. t[p+1+count] into tokens [B, >= max_len], p = last[b].

        What the trunk computed at p and before has been stored.
        """
        h = self.hidden(self.windows.next(last, count), last, count, run)  # [B, count, D]
        drafts = sampler.draft(self.model.output(self.model.norm(h)))  # [B, count]
        tokens[self.positions.index([p + 2 for p in last], count)] = drafts

    def hidden(self, window: Span, last: Sequence[int], count: int, run: Runner) -> Tensor:
        """Run `count` heads over a window; their states at p: [B, count, D]."""
        block, positions = self.heads[count]
        z = self.z[window.where].repeat(count, 1, 1)  # [H * B, size, D], H = count
        rows = positions.span(window.starts * count, window.size)
        h = run.block(block, z, rows.context, self.cache.at(rows))
        h = take(h, window.columns(last) * count)  # [H * B, 1, D]
        return h.view(count, len(last), -1).transpose(0, 1)


class InTurnDrafter(ParallelDrafter):
    """The same for blocks that can't be stacked (experts, latent attention): head by head."""

    def __init__(self, model: Transformer, positions: Positions, num_draft: int) -> None:
        self.model, self.positions = model, positions
        self.windows = Windows(positions, [0] * num_draft)
        self.blocks = model.mtp.head_blocks(model)[1 : num_draft + 1]
        self.caches = [LayerCache(block.attention, positions) for block in self.blocks]
        self.z = positions.states(len(model.norm.weight))

    def hidden(self, window: Span, last: Sequence[int], count: int, run: Runner) -> Tensor:
        """As `ParallelDrafter.hidden`."""
        z, columns = self.z[window.where], window.columns(last)
        heads = zip(self.blocks[:count], self.caches, strict=False)
        states = [run.block(block, z, window.context, cache.at(window)) for block, cache in heads]
        return torch.cat([take(h, columns) for h in states], dim=1)


class SequentialDrafter:
    """A chain of modules (DeepSeek-V3): each draft is made with the drafts before it.

    Module k at position i takes emb(t[i+k-1]) and h_{k-1}[i]. At position p, t[p+1] is known and
    t[p+2] .. are the drafts just made, so the entries of module k at positions p+3-k .. p rest on
    drafts, and go stale when one is rejected. With p' > p the next time, nothing before
    p'+2-k is ever stale. Every module runs over one window that ends at p': the new positions, and
    at least as many as there are modules (for n = 2, the new positions alone).
    """

    def __init__(self, model: Transformer, positions: Positions, num_draft: int) -> None:
        self.model, self.positions = model, positions
        depths = range(2, num_draft + 2)
        self.windows = Windows(positions, [k - 1 for k in depths])
        # A cache a depth, not a module: a shared module has one for each time it is applied.
        self.modules = [model.mtp.module(k) for k in depths]
        self.caches = [LayerCache(m.block.attention, positions) for m in self.modules]
        self.h = positions.states(len(model.norm.weight))  # h_1

    def store(self, states: TrunkStates, span: Span) -> None:
        """As `ParallelDrafter.store`."""
        self.h[span.where] = states.h

    def draft(
        self, tokens: Tensor, last: Sequence[int], count: int, sampler: Sampler, run: Runner
    ) -> None:
        """As `ParallelDrafter.draft`."""
        window = self.windows.next(last, count)
        columns = window.columns(last)
        h = self.h[window.where]  # [B, size, D]
        for k, module, cache in zip(range(2, count + 2), self.modules, self.caches, strict=False):
            emb = self.model.tok_embeddings(tokens[shifted(window.where, k - 1)])
            h = run.block(module, h, emb, window.context, cache.at(window))
            drafts = sampler.draft(self.model.output(take(h, columns)))  # [B, 1]
            tokens[self.positions.index([p + k for p in last], 1)] = drafts


Drafter = ParallelDrafter | SequentialDrafter


def build_drafter(model: Transformer, positions: Positions, num_draft: int) -> Drafter:
    """What drafts up to `num_draft` tokens a step with the model's family of heads."""
    if model.mtp.family != "parallel":
        return SequentialDrafter(model, positions, num_draft)
    stackable = model.args.latent is None and model.args.moe is None
    return (ParallelDrafter if stackable else InTurnDrafter)(model, positions, num_draft)
