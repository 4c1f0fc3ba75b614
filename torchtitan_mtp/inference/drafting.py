"""How heads 2..n propose the tokens after the next one, from caches of their own.

After the trunk has run up to position p, tokens t[0] .. t[p+1] are known (t[p+1] from head 1), and
head k at position p proposes t[p+k]. To do so it attends over its own keys and values of positions
0..p; this file is about keeping those what a forward over the whole text would make them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from torchtitan_mtp.inference.cache import (
    LayerCache,
    Positions,
    RowPositions,
    Span,
    advance,
    repeat_rows,
    shift_index,
    take,
)
from torchtitan_mtp.inference.sampling import Noise, Sampler
from torchtitan_mtp.inference.stacking import first_heads, stack
from torchtitan_mtp.models.heads import Heads
from torchtitan_mtp.models.trunk import Trunk
from torchtitan_mtp.mtp.medusa import MedusaHeads
from torchtitan_mtp.mtp.parallel import ParallelHeads
from torchtitan_mtp.mtp.sequential import SequentialHeads


class Plan(NamedTuple):
    """What a step is to do, as the host has decided it.

    last: p of every row. drafts: how many tokens to draft. window: over how many positions, the
    last of them p, the drafting heads run. noise: what is random in it, if anything. keys: before
    which position the keys lie that it attends to, where `last` is on the device.
    """

    last: RowPositions
    drafts: int
    window: int
    noise: Noise | None
    keys: int | None = None


class CacheLengths:
    """How many positions the heads have yet to run over.

    A step may leave heads out, and what a head kept may rest on drafts (its last `lags[j]`
    positions, once the row has grown): a head runs again from where its entries stop being those
    of the text.
    """

    def __init__(self, batch: int, lags: Sequence[int]) -> None:
        self.lags = np.array(lags)[:, None]
        self.right = np.zeros((len(lags), batch), int)  # entries before this one are right

    def window(self, last: Sequence[int], count: int) -> int:
        """The size of a window that ends at p = last[b] and has all that `count` heads lack."""
        lengths = np.array(last) + 1
        self.right = np.minimum(self.right, lengths - self.lags).clip(0)
        lacking = lengths - self.right[:count]
        self.right[:count] = lengths
        return max(1, int(lacking.max())) if count else 0


class ParallelDrafter:
    """Heads 2..n beside the last layer (Gloeckle et al. 2024): all drafts at once from z.

    A head's keys at position i depend on t[0..i] alone, so the entries of accepted positions are
    right for good, and each step adds those of its own.

    states: what the heads read of the trunk at every position [B, max_len, D], which `Decoder`
    writes. reads: "z", under its last layer; "raw", after it; or "h", after the final norm.
    """

    reads = "z"

    def __init__(self, model: Trunk, positions: Positions, num_draft: int) -> None:
        self.model, self.positions = model, positions
        self.lengths = CacheLengths(positions.batch, [0] * num_draft)
        self.states = positions.states(model.args.dim)
        assert model.mtp is not None
        self._take(list(model.mtp.heads)[:num_draft])

    def _take(self, blocks: Sequence[Any]) -> None:
        # The heads are rows of one batch: head 2's rows, head 3's rows, ...
        block, at = stack(blocks), self.positions.repeat
        counts = range(1, len(blocks) + 1)
        self.heads = {count: (first_heads(block, count), at(count)) for count in counts}
        self.cache = LayerCache(block, at(len(blocks)))

    def draft(self, tokens: Tensor, plan: Plan, sampler: Sampler) -> Tensor | None:
        """Write drafts for t[p+2] .. t[p+1+count] into tokens [B, >= max_len].

        Returns what they were drawn from [B, drafts, V]; None when greedy.
        """
        starts = advance(plan.last, 1 - plan.window)
        window = self.positions.span(starts, plan.window, plan.keys)
        h = self.hidden(window, plan)  # [B, drafts, D]
        drafts, q = sampler.draft(self.model.output(h), plan.noise)
        tokens[self.positions.index(advance(plan.last, 2), plan.drafts)] = drafts
        return q

    def hidden(self, window: Span, plan: Plan) -> Tensor:
        """Run as many heads over a window; h_2, h_3, ... at p: [B, drafts, D]."""
        count = plan.drafts
        block, positions = self.heads[count]
        z = self.states[window.where].repeat(count, 1, 1)  # [H * B, size, D], H = count
        rows = positions.span(repeat_rows(window.starts, count), window.size, plan.keys)
        h = block(z, rows.context, self.cache.at(rows))
        h = take(h, repeat_rows(window.columns(plan.last), count))  # [H * B, 1, D]
        return self.model.norm(h.view(count, -1, h.shape[-1]).transpose(0, 1))


class UnstackedDrafter(ParallelDrafter):
    """The same for blocks that aren't stacked (experts, latent, transformers'): head by head."""

    def _take(self, blocks: Sequence[Any]) -> None:
        self.blocks = blocks
        self.caches = [LayerCache(block, self.positions) for block in blocks]

    def hidden(self, window: Span, plan: Plan) -> Tensor:
        """As `ParallelDrafter.hidden`."""
        z, columns = self.states[window.where], window.columns(plan.last)
        heads = zip(self.blocks[: plan.drafts], self.caches, strict=False)
        states = [window.context.run(block, z, cache.at(window)) for block, cache in heads]
        return self.model.norm(torch.cat([take(h, columns) for h in states], dim=1))


class MedusaDrafter(ParallelDrafter):
    """Light heads (Medusa): all drafts at once from head 1's state at p, without caches."""

    reads = "h"

    def _take(self, blocks: Sequence[Any]) -> None:
        self.blocks = blocks

    def hidden(self, window: Span, plan: Plan) -> Tensor:
        """As `ParallelDrafter.hidden`."""
        h = take(self.states[window.where], window.columns(plan.last))  # [B, 1, D]
        return torch.cat([block(h) for block in self.blocks[: plan.drafts]], dim=1)


class SequentialDrafter:
    """A chain of modules (DeepSeek-V3): each draft is made with the drafts before it.

    Module k at position i takes emb(t[i+k-1]) and h_{k-1}[i] (module 2 of a raw chain the trunk's
    state before its norm). At position p, t[p+1] is known and t[p+2] .. are the drafts just made,
    so the entries of module k at positions p+3-k .. p rest on drafts, and go stale when one is
    rejected. With p' > p the next time, nothing before p'+2-k is ever stale. Every module runs over
    one window that ends at p': the new positions, and at least as many as there are modules (for
    n = 2, the new positions alone).
    """

    def __init__(self, model: Trunk, positions: Positions, num_draft: int) -> None:
        self.model, self.positions = model, positions
        depths = range(2, num_draft + 2)
        self.lengths = CacheLengths(positions.batch, [k - 1 for k in depths])
        # A cache a depth, not a module: a shared module has one for each time it is applied.
        heads = cast(SequentialHeads, model.mtp)
        self.modules: list[Any] = [heads.module(k) for k in depths]
        self.caches = [LayerCache(m.block, positions) for m in self.modules]
        # What the first module reads, as `ParallelDrafter` says.
        self.states = positions.states(model.args.dim)
        self.reads = "raw" if heads.trunk_state == "raw" else "h"

    def draft(self, tokens: Tensor, plan: Plan, sampler: Sampler) -> Tensor | None:
        """As `ParallelDrafter.draft`."""
        starts = advance(plan.last, 1 - plan.window)
        window = self.positions.span(starts, plan.window, plan.keys)
        columns = window.columns(plan.last)
        drawn_from: list[Tensor] = []
        h = self.states[window.where]  # [B, size, D]
        for j in range(plan.drafts):
            emb = self.model.embed(tokens[shift_index(window.where, j + 1)])
            h = self.modules[j](h, emb, window.context, self.caches[j].at(window))
            logits = self.model.output(take(h, columns))  # [B, 1, V]
            drafts, q = sampler.draft(logits, plan.noise, j)
            tokens[self.positions.index(advance(plan.last, j + 2), 1)] = drafts  # [B, 1]
            if q is not None:
                drawn_from.append(q)
        return torch.cat(drawn_from, dim=1) if drawn_from else None


Drafter = ParallelDrafter | SequentialDrafter
DRAFTERS: dict[type[Heads], type[Drafter]] = {
    ParallelHeads: ParallelDrafter,
    SequentialHeads: SequentialDrafter,
    MedusaHeads: MedusaDrafter,
}


def build_drafter(model: Trunk, positions: Positions, num_draft: int) -> Drafter:
    """What drafts up to `num_draft` tokens a step with the model's heads."""
    assert model.mtp is not None
    drafter = DRAFTERS[type(model.mtp)]
    stacks = model.native_blocks and not (model.args.latent or model.args.moe)
    if drafter is ParallelDrafter and not stacks:
        drafter = UnstackedDrafter
    return drafter(model, positions, num_draft)
