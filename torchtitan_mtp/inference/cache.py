"""Keys and values of positions that were computed already, and the positions of a forward.

Every row of a batch has a length of its own, and every tensor here is indexed by position. A query
sees the keys at positions up to its own and nothing after them. So nothing is ever erased: to take
rejected drafts back is to let the row's length be what it was; what they left behind lies beyond
every query until it is overwritten. The padding after a short prompt is left in the same way.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchtitan_mtp.models.attention import KVCache
from torchtitan_mtp.models.trunk import Trunk
from torchtitan_mtp.transfer import to_device

# Picks positions from a tensor [B, max_len, ...] as [B, size, ...], to read or to write.
Index = tuple[Any, Any]

# A position of every row: numbers, of which slices can be made, or [B, 1] for compiled code, which
# would take numbers for constants.
RowPositions = Sequence[int] | Tensor


def advance(positions: RowPositions, by: int) -> RowPositions:
    """Each position moved on by `by` positions, and to 0 where that is before the text."""
    if isinstance(positions, Tensor):
        return (positions + by).clamp(min=0)
    return [max(0, position + by) for position in positions]


def repeat_rows(positions: RowPositions, times: int) -> RowPositions:
    """The positions of `times` as many rows."""
    if isinstance(positions, Tensor):
        return positions.repeat(times, 1)
    return list(positions) * times


class Span(NamedTuple):
    """`size` consecutive positions of every row, from `starts[b]` on: what one forward computes.

    where: picks them from a tensor by position. end: the forward attends to keys before this one.
    context: a `BlockContext`, with rotary angles, and which keys each position sees.
    """

    starts: RowPositions
    size: int
    where: Index
    end: int
    context: Any

    def columns(self, positions: RowPositions) -> RowPositions:
        """Where `positions[b]` lies in row b of the span; 0 for a finished row, left behind it."""
        if isinstance(positions, Tensor) and isinstance(self.starts, Tensor):
            return (positions - self.starts).clamp(min=0)
        return [max(0, p - start) for p, start in zip(positions, self.starts, strict=True)]


class Positions:
    """Makes the spans of a generation: positions 0 .. max_len - 1 of `batch` rows."""

    def __init__(self, model: Trunk, batch: int, max_len: int) -> None:
        like = model.tok_embeddings.weight
        self.batch, self.max_len, device = batch, max_len, like.device
        self.context = model.spans(max_len)
        self.all = torch.arange(max_len, device=device)
        self.rows = torch.arange(batch, device=device).unsqueeze(1)  # [B, 1]
        # What a score is raised by: attention would make it of a bool mask in every layer.
        self.seen, self.unseen = like.new_zeros(()), like.new_full((), -torch.inf)

    def states(self, width: int) -> Tensor:
        """Room for a state of every position: [B, max_len, width]."""
        return self.seen.new_zeros(self.batch, self.max_len, width)

    def repeat(self, times: int) -> Positions:
        """The same positions for `times` as many rows."""
        other = copy.copy(self)
        other.batch = times * self.batch
        other.rows = torch.arange(other.batch, device=self.rows.device).unsqueeze(1)
        return other

    def index(self, starts: RowPositions, size: int) -> Index:
        """Of the `size` positions from `starts[b]` on in row b."""
        if not isinstance(starts, Tensor):
            start = starts[0]
            if all(s == start for s in starts):  # one row, or rows in step: no gathering
                return slice(None), slice(start, start + size)
            starts = to_device(torch.tensor(starts), self.all.device).unsqueeze(1)
        return self.rows, starts + self.all[:size]  # [B, 1], [B, size]

    def span(self, starts: RowPositions, size: int, keys: int | None = None) -> Span:
        """What a forward over the positions of `index(starts, size)` needs.

        From positions on the device, spans of one size look alike to a compiler: index tensors,
        and a mask over all keys, or over those before `keys`, never slices and an end.
        """
        _, where = index = self.index(starts, size)
        on_device = isinstance(starts, Tensor)
        end = keys or self.max_len if on_device else max(starts) + size

        def mask(window: int | None = None) -> Tensor:
            keys, at = self.all[:end], self.all[where].view(-1, size, 1)
            visible = keys <= at  # [B or 1, size, end]
            if window is not None:
                visible = visible & (keys > at - window)
            return torch.where(visible, self.seen, self.unseen).unsqueeze(1)

        return Span(starts, size, index, end, self.context(where, size, end, mask))


def shift_index(index: Index, by: int) -> Index:
    """The index of the positions `by` later."""
    rows, where = index
    if isinstance(where, slice):
        return rows, slice(where.start + by, where.stop + by)
    return rows, where + by


class LayerCache:
    """Keys and values of a block's attention, [B, KV, max_len, hd] each, allocated once; of a
    latent one what these are made of."""

    def __init__(self, block: Any, positions: Positions) -> None:
        self.positions, self.k, self.v = positions, torch.empty(0), torch.empty(0)
        # Of transformers' blocks the first keys and values tell how wide they are.
        if shape := getattr(getattr(block, "attention", None), "cache_shape", None):
            self._allocate(positions.seen, *shape)

    def _allocate(self, like: Tensor, heads: int, *widths: int) -> None:
        # Zeros: a masked key still takes part in the arithmetic, and 0 * NaN is NaN.
        room = self.positions.batch, heads, self.positions.max_len
        self.k, self.v = (like.new_zeros(*room, width) for width in widths)

    def at(self, span: Span) -> KVCache:
        """This cache for one forward over `span`: what `Attention.forward` takes."""
        return functools.partial(self.update, span)

    def update(self, span: Span, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, KV, size, hd] at the span; all up to its end, [B, KV, end, hd] each."""
        if not self.k.numel():
            self._allocate(k, k.shape[1], k.shape[-1], v.shape[-1])
        own_k, own_v = self.k[: len(k)], self.v[: len(v)]  # there may be room for more rows
        own_k.transpose(1, 2)[span.where] = k.transpose(1, 2)
        own_v.transpose(1, 2)[span.where] = v.transpose(1, 2)
        return own_k[:, :, : span.end], own_v[:, :, : span.end]


def take(x: Tensor, columns: RowPositions) -> Tensor:
    """x [B, size, D] -> [B, 1, D]: column `columns[b]` of row b."""
    if isinstance(columns, Tensor):
        return x.take_along_dim(columns.unsqueeze(-1), dim=1)
    first = columns[0]
    if all(c == first for c in columns):
        return x[:, first : first + 1]
    chosen = to_device(torch.tensor(columns), x.device)
    return x[torch.arange(len(x), device=x.device), chosen].unsqueeze(1)
