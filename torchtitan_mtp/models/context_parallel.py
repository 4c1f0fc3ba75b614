"""Context parallelism: each sequence is spread over the ranks of a group.

A sequence of S tokens is cut into 2R chunks, and rank r of R has chunks r and 2R - 1 - r: an early
one, whose queries see few keys, and a late one, so that all ranks have the same causal work. Labels
and future tokens are in the batch before it is cut, so no head needs a neighbour's. What does are

- attention, which gathers keys and values of all ranks (`gather_kv`; its backward sums their
  gradients and scatters them) and tells by positions and documents what a query may see (`mask`);
- targets that are head 1's own distribution further on (`with_following`);
- the balance loss of experts, a product of two means over a sequence (`sum`);
- in validation, the agreement of heads, over tokens (`whole`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from torchtitan_mtp.data.targets import Batch
from torchtitan_mtp.models.packed import BLOCK, list_blocks

CHUNKS = 2  # of each sequence on a rank
# Their names since torch 2.13, and before.
_all_gather = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor
_reduce_scatter = getattr(funcol, "reduce_scatter_single", None) or funcol.reduce_scatter_tensor


class SequenceRanks:
    """The ranks of a group, each with a part of the same sequences: of [B, S, ...] it has
    [B, S / size, ...]. Gathered tensors [B, S, ...] have the ranks' parts one after another."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.size = group.rank(), group.size()
        self.name: Any = group.group_name

    def gather(self, x: Tensor) -> Tensor:
        """x [B, S / size, ...] of all ranks: [B, S, ...]. The gradient is the sum of the ranks'."""
        return gather(x, self.name)

    def scatter(self, x: Tensor) -> Tensor:
        """Of the sum of all ranks' x [B, S, ...] this rank's part [B, S / size, ...]; the gradient
        is gathered."""
        return _Scatter.apply(x, self.name)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, a constant to autograd."""
        return arrived(funcol.all_reduce(x.detach(), "sum", self.name))


class ContextParallel(SequenceRanks):
    """The ranks to which each sequence is dealt: one has two chunks, one after the other."""

    def shard(self, batch: Batch) -> Batch:
        """This rank's part of a batch whose length is a multiple of 2 * size."""
        own = [self.rank, CHUNKS * self.size - 1 - self.rank]
        length = batch.tokens.shape[1] // (CHUNKS * self.size)
        tensors = {name: x for name, x in batch._asdict().items() if isinstance(x, Tensor)}
        chunks = {n: x.unflatten(1, (CHUNKS * self.size, length)) for n, x in tensors.items()}
        parts = {n: x[:, own].flatten(1, 2) for n, x in chunks.items()}
        return batch._replace(**parts, documents=None)

    def gather_kv(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, S / size, KV, *] of all ranks in one collective: [B, S, KV, *]."""
        k, v = self.gather(torch.cat((k, v), dim=-1)).split((k.shape[-1], v.shape[-1]), dim=-1)
        return k, v

    def whole(self, x: Tensor) -> Tensor:
        """x [B, S / size, ...] of all ranks in the sequence's order: [B, S, ...]."""
        chunks = self.gather(x).unflatten(1, (self.size, CHUNKS, x.shape[1] // CHUNKS))
        return torch.cat((chunks[:, :, 0], chunks[:, :, 1].flip(1)), dim=1).flatten(1, 2)

    def with_following(self, x: Tensor, count: int) -> Tensor:
        """x [B, S / size, D] as chunks, each with the first `count` rows of the chunk after it:
        [B, 2, C + count, D]; zeros beyond the sequence. `count` is at most C = S / size / 2."""
        chunks = x.unflatten(1, (CHUNKS, x.shape[1] // CHUNKS))  # [B, 2, C, D]
        starts = self.whole(chunks[:, :, :count].flatten(1, 2))  # [B, 2 * size * count, D]
        starts = starts.unflatten(1, (CHUNKS * self.size, count))
        starts = torch.cat((starts, torch.zeros_like(starts[:, :1])), dim=1)
        after = (self.rank + 1, CHUNKS * self.size - self.rank)
        following = torch.stack([starts[:, chunk] for chunk in after], dim=1)  # [B, 2, count, D]
        return torch.cat((chunks, following), dim=2)

    def mask(self, batch: Batch, packed: bool, blocks: bool) -> Tensor | BlockMask:
        """What this rank's queries see of all ranks' keys, as they are gathered: no later position
        and, if `packed`, no other document.

        blocks: as FlexAttention has it, which leaves out blocks of keys that are not seen; else
        [B or 1, 1, S / size, S] to be added to the scores.
        """
        rows = slice(None) if packed else slice(1)  # positions are the same in all rows
        q_at = batch.positions[rows]  # [B, S / size]
        k_at, start = self.gather(q_at), torch.zeros_like(q_at)
        if packed:
            begins = torch.diff(docs := self.whole(batch.doc_ids), dim=1, prepend=docs[:, :1] - 1)
            at = torch.arange(docs.shape[1], device=docs.device)
            start = torch.where(begins != 0, at, 0).cummax(dim=1).values  # [B, S]
            start = start.gather(1, q_at)  # of each query's document
        if blocks:
            return _block_mask(q_at, k_at, start)
        seen = (q_at[:, :, None] >= k_at[:, None, :]) & (k_at[:, None, :] >= start[:, :, None])
        # (Of a bool, every layer would make this anew, and keep it for its backward.)
        zeros = torch.zeros(seen.shape, device=seen.device)
        return zeros.masked_fill_(~seen, -torch.inf).unsqueeze(1)


def _block_mask(q_at: Tensor, k_at: Tensor, start: Tensor) -> BlockMask:
    """Of queries at q_at [B, Q] and keys at k_at [B, K]: what is not behind a query and not before
    its start [B, Q]. As `packed.block_mask`, for blocks in any order."""

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q_at[b, q] >= k_at[b, k]) & (k_at[b, k] >= start[b, q])

    # Past the ends: queries that see nothing whole, keys that nothing sees whole.
    (q_first, q_last), (k_first, k_last) = _extremes(q_at, -1), _extremes(k_at, k_at.shape[1])
    start_first, start_last = _extremes(start, 0)
    seen = k_first[:, None] <= q_last[..., None]
    seen &= k_last[:, None] >= start_first[..., None]  # [B, Q, K], in blocks
    whole = k_last[:, None] <= q_first[..., None]
    whole &= k_first[:, None] >= start_last[..., None]
    return BlockMask.from_kv_blocks(
        *list_blocks(seen & ~whole),
        *list_blocks(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(q_at.shape[1], k_at.shape[1]),
    )


def _extremes(x: Tensor, beyond: int) -> tuple[Tensor, Tensor]:
    """Least and largest of each block of x [B, L], `beyond` its end."""
    blocks = F.pad(x, (0, -x.shape[1] % BLOCK), value=beyond).unflatten(1, (-1, BLOCK))
    return blocks.amin(-1), blocks.amax(-1)


def gather(x: Tensor, group: Any) -> Tensor:
    """x [B, S / ranks, ...] of the ranks of a group, one after another: [B, S, ...]. The gradient
    is the sum of the ranks'."""
    return _Gather.apply(x, group)


class _Gather(torch.autograd.Function):
    """Along dimension 1. (torch's own version with a gradient loses it in `wait`.)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return arrived(_all_gather(x.contiguous(), 1, group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return arrived(_reduce_scatter(grad.contiguous(), "sum", 1, ctx.group)), None


class _Scatter(torch.autograd.Function):
    """The reverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return arrived(_reduce_scatter(x.contiguous(), "sum", 1, group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return arrived(_all_gather(grad.contiguous(), 1, ctx.group)), None


def arrived(x: Tensor) -> Tensor:
    """What a collective gives, once it is there."""
    return x.wait() if isinstance(x, funcol.AsyncCollectiveTensor) else x
