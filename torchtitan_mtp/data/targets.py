"""From a window of tokens to the targets of every head, once, before anything is sharded.

Head k (1..n) at position i predicts t[i+k]. Every later stage (context parallelism, the heads, the
loss) slices what is made here and never shifts again, so this file is the only place that knows
how far ahead a head looks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan_mtp.transfer import to_device

IGNORE = -100  # label of a position that has no target
PADDING = -1  # document id of a token that is not there


class Window(NamedTuple):
    """S input tokens and the n tokens after them, for each of B sequences.

    Attributes:
        tokens: [B, S+n] int64.
        doc_ids: [B, S+n] int64, which document of the window each token is in: it grows by one at
            each document's first token. `PADDING` where there is no token, only at the end.
        loss_mask: [B, S+n] bool, True where a token may be a target; None means everywhere.
    """

    tokens: Tensor
    doc_ids: Tensor
    loss_mask: Tensor | None = None

    def split(self, parts: int) -> list[Window]:
        """Its sequences in `parts` of the same size."""
        tensors = (None if t is None else t.chunk(parts) for t in self)
        pieces = ([None] * parts if t is None else t for t in tensors)
        return [Window(*piece) for piece in zip(*pieces, strict=True)]


class Documents(NamedTuple):
    """Where the documents of B rows begin that lie one behind another (`cu_seqlens` elsewhere).

    Attributes:
        starts: [documents + 1] int32, in order, and B*S behind them.
        longest: tokens of the longest.
    """

    starts: Tensor
    longest: int


class Batch(NamedTuple):
    """What a step reads. Every tensor has the sequence as its dimension 1.

    Attributes:
        tokens: [B, S] int64, inputs of the trunk.
        future_tokens: [B, S, n-1] int64; [..., k-2] = t[i+k-1], the teacher-forced input of
            sequential head k (2..n). Not masked: what it feeds is masked in `labels`.
        labels: [B, S, n] int64; [..., k-1] = t[i+k], or IGNORE where there is no such target.
        positions: [B, S] int64, 0..S-1 in every row. They do not restart at a document: rotary
            embeddings depend on differences of positions only.
        doc_ids: [B, S] int64, as in `Window`.
        documents: on an accelerator, what `doc_ids` say in another form; padding is a document.
    """

    tokens: Tensor
    future_tokens: Tensor
    labels: Tensor
    positions: Tensor
    doc_ids: Tensor
    documents: Documents | None = None

    def to(self, device: torch.device) -> Batch:
        """On `device`. How many documents there are decides shapes, so they are listed before,
        while the ids are on the host: nothing has to wait for the accelerator."""
        documents = None
        if device.type != "cpu":
            starts, longest = list_documents(self.doc_ids)
            documents = Documents(to_device(starts, device), longest)
        tokens, future, labels, positions, doc_ids = (to_device(t, device) for t in self[:5])
        return Batch(tokens, future, labels, positions, doc_ids, documents)


def list_documents(doc_ids: Tensor) -> Documents:
    """The documents of doc_ids [B, S], of every row its own."""
    begins = torch.diff(doc_ids, dim=1, prepend=doc_ids[:, :1] - 1) != 0
    starts = F.pad(begins.flatten().nonzero().squeeze(1), (0, 1), value=doc_ids.numel())
    return Documents(starts.int(), int(starts.diff().max()))


def make_batch(window: Window, num_future_tokens: int, from_head_1: bool = False) -> Batch:
    """Inputs and targets of every head for a window [B, S+n], n = `num_future_tokens`.

    labels[b, i, k-1] = t[i+k] where tokens i and i+k are of one document and the loss mask allows
    t[i+k], else IGNORE. The ids decide at distance k itself, so a document shorter than k, lying
    wholly between i and i+k, is seen as the boundary it is.

    Args:
        from_head_1: whether heads 2..n learn from head 1, which has t[i+k] as its target k-1 places
            further on. Then i+k-1 has to be one of the S positions, too.

    Raises:
        ValueError: `num_future_tokens` < 1, or the window is not wider than it.
    """
    tokens, doc_ids, loss_mask = window
    n = num_future_tokens
    batch_size, width = tokens.shape
    seq_len = width - n
    if n < 1 or seq_len < 1:
        raise ValueError(f"a window of {width} tokens can't hold {n} future tokens")

    # unfold: [B, S+n] -> [B, S, n+1], [..., k] = the token k places after i
    ahead = tokens.unfold(1, n + 1, 1)
    doc_ahead = doc_ids.unfold(1, n + 1, 1)
    doc = doc_ids[:, :seq_len]  # [B, S]
    is_target = (doc_ahead[..., 1:] == doc.unsqueeze(-1)) & (doc.unsqueeze(-1) != PADDING)
    if loss_mask is not None:
        is_target &= loss_mask.unfold(1, n + 1, 1)[..., 1:]
    if from_head_1:
        i, k = torch.arange(seq_len).unsqueeze(1), torch.arange(1, n + 1)
        is_target &= (i + k - 1 < seq_len).to(tokens.device)  # [S, n]
    labels = torch.where(is_target, ahead[..., 1:], IGNORE)  # [B, S, n]
    positions = torch.arange(seq_len, device=tokens.device).expand(batch_size, seq_len)
    return Batch(
        tokens=tokens[:, :seq_len].contiguous(),
        future_tokens=ahead[..., 1:n].contiguous(),  # [B, S, n-1]
        labels=labels,
        positions=positions.contiguous(),
        doc_ids=doc.contiguous(),
    )
