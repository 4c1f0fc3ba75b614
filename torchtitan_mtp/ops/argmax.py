"""The most likely token of every row, without whole logits."""

from __future__ import annotations

import torch
from torch import Tensor

from torchtitan_mtp.ops.chunked import default_chunk_rows, matmul_dtype, project


@torch.no_grad()
def chunked_argmax(hidden: Tensor, weight: Tensor, chunk_rows: int | None = None) -> Tensor:
    """`(hidden @ weight.T).argmax(-1)` [N] int64, from hidden [N, D] and the unembedding [V, D].

    chunk_rows: rows whose logits [C, V] are alive at a time; None: as in the loss. Products run as
    they do there, in the inputs' dtype with logits in float32, so that what is most likely here is
    what the loss counts as correct. A soft cap of the logits changes nothing.
    """
    mm = matmul_dtype(hidden)
    acc = torch.promote_types(mm, torch.float32)
    if mm != acc:
        weight = weight.to(mm)  # autocast: one narrower copy
    n_rows, vocab = hidden.shape[0], weight.shape[0]
    chunk = min(chunk_rows or default_chunk_rows(hidden), max(n_rows, 1))
    buffer = torch.empty(chunk, vocab, dtype=acc, device=hidden.device)
    best = torch.empty(n_rows, dtype=torch.int64, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):  # `mm` has decided
        for start in range(0, n_rows, chunk):
            h = hidden[start : start + chunk].to(mm)  # [C, D]
            logits = project(h, weight, buffer[: h.shape[0]])  # [C, V]
            torch.argmax(logits, dim=1, out=best[start : start + chunk])
    return best
