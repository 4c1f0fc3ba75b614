"""Attention within the documents of packed rows: a form of the mask, and the kernel that reads it.

- a bool mask and SDPA, on CPUs and wherever the other two can't run;
- FlexAttention on GPUs, which skips the blocks of 128 x 128 that no query may see;
- varlen attention on GPUs (`model.attn_type = "varlen"`): FlashAttention over documents one behind
  another, which knows no mask at all.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from torchtitan_mtp.data.targets import Batch, Documents
from torchtitan_mtp.errors import UserError

BLOCK = 128  # of FlexAttention's masks
FLEX_MIN_WIDTH = 16  # of a head, in FlexAttention's kernels on GPUs
# FlexAttention pads widths to powers of two (192 to 256). There its backward spills 1164 bytes a
# thread for an H100 and 3536 for an A100 with the 4 warps that it takes; with 8, as it takes for a
# B200, 16 and 4. (ptxas, torch 2.12. At 128 its backward spills 248, its forward nothing.)
WIDE = 128
WIDE_OPTIONS: Any = {"bwd_num_warps": 8}
FLASH_MAX_WIDTH, FLASH_ALIGNED = 256, 8  # of a head, in FlashAttention's kernels
# torch 2.11 takes grouped heads without being told.
_GROUPED: dict[str, Any] = {}
if "enable_gqa" in inspect.signature(varlen_attn).parameters:
    _GROUPED["enable_gqa"] = True

PackedMask = Tensor | BlockMask | Documents


def activate_flash_attention(impl: str) -> None:
    """Put "FA3" or "FA4" in the place of torch's FlashAttention, in this process; "FA2": leave all
    as it is. Error: its package is missing or of another version."""
    if impl == "FA2":
        return
    try:
        activate_flash_attention_impl(impl)
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f'model.flash_attn_impl = "{impl}": {error}; install its package, or take "FA2"'
        ) from error


def packed_mask(
    batch: Batch, widths: tuple[int, int], dtype: torch.dtype, attn_type: str = "flex"
) -> PackedMask:
    """Causal attention within documents, from a batch's doc_ids [B, S].

    widths: of a head's queries and keys, and of its values; dtype: theirs.
    attn_type: on GPUs, "flex" or "varlen"; the latter where its kernels take such heads.
    """
    doc_ids, documents = batch.doc_ids, batch.documents
    if not in_blocks(doc_ids, widths):
        return dense_mask(doc_ids)
    aligned = max(widths) <= FLASH_MAX_WIDTH and not any(w % FLASH_ALIGNED for w in widths)
    if attn_type == "varlen" and documents and aligned and dtype.itemsize == 2:
        # One graph for any number of documents.
        torch._dynamo.maybe_mark_dynamic(documents.starts, 0)
        return documents
    return block_mask(doc_ids)


def in_blocks(tokens: Tensor, widths: tuple[int, int]) -> bool:
    """Whether FlexAttention's kernels run where `tokens` are, with heads of these widths."""
    return tokens.is_cuda and min(widths) >= FLEX_MIN_WIDTH


def dense_mask(doc_ids: Tensor) -> Tensor:
    """[B, 1, S, S], True where attention is allowed."""
    seq = doc_ids.shape[1]
    causal = torch.ones(seq, seq, dtype=torch.bool, device=doc_ids.device).tril()
    return (causal & (doc_ids[:, :, None] == doc_ids[:, None, :])).unsqueeze(1)


def block_mask(doc_ids: Tensor) -> BlockMask:
    """The same for FlexAttention, from ends of blocks alone: torch's `create_block_mask` goes over
    [B, S, S]."""
    seq = doc_ids.shape[1]
    at = torch.arange(seq, device=doc_ids.device)
    begins = torch.diff(doc_ids, dim=1, prepend=doc_ids[:, :1] - 1) != 0
    start = torch.where(begins, at, 0).cummax(dim=1).values.int()  # of each token's document

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (q >= kv) & (kv >= start[b, q])

    # A block of keys is seen if its last token is not before the document of the first query, and
    # seen whole, without a look at the mask, if its first one is not before that of the last query.
    first = at[::BLOCK]
    last = (first + BLOCK - 1).clamp(max=seq - 1)
    seen = (first <= first[:, None]) & (last >= start[:, first, None])  # [B, Q, K]
    whole = (first < first[:, None]) & (first >= start[:, last, None])
    whole &= (first + BLOCK <= seq)[:, None]  # as torch has it, queries past the end see nothing
    return BlockMask.from_kv_blocks(
        *list_blocks(seen & ~whole),
        *list_blocks(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(seq, seq),
    )


def list_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of blocks [B, Q, K], those that are True: how many in each row [B, 1, Q], and their numbers,
    which come first in [B, 1, Q, K]."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    # Uncompiled FlexAttention materialises every score; compiled, it is a kernel. Lengths become
    # symbols once they change: with `dynamic=False`, torch.compile gives up after eight of them.
    return torch.compile(flex_attention)


def attend_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float | None
) -> Tensor:
    """FlexAttention; shapes as in `attend`."""
    return _compiled_flex_attention()(
        *(q, k, v),
        block_mask=mask,
        scale=scale,
        enable_gqa=k.shape[1] != q.shape[1],
        kernel_options=WIDE_OPTIONS if q.shape[-1] > WIDE else None,
    )


def attend_in_documents(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float | None
) -> Tensor:
    """Varlen attention; shapes as in `attend`, of S queries and S keys."""
    width, value_width = q.shape[-1], v.shape[-1]
    if value_width < width:
        v = F.pad(v, (0, width - value_width))  # its kernels have one width: latent attention's 192
    q_rows, k_rows, v_rows = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B * S, H, d]
    starts, longest = documents
    out = varlen_attn(
        *(q_rows, k_rows, v_rows, starts, starts, longest, longest),
        scale=scale,
        window_size=(-1, 0),  # causal
        **(_GROUPED if k.shape[1] != q.shape[1] else {}),
    )
    assert isinstance(out, Tensor)
    return out[..., :value_width].unflatten(0, (q.shape[0], -1)).transpose(1, 2)
