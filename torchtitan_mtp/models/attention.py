"""Causal self-attention with rotary positions and grouped key-value heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from torchtitan_mtp.data.targets import Documents
from torchtitan_mtp.models.args import ModelArgs
from torchtitan_mtp.models.context_parallel import ContextParallel
from torchtitan_mtp.models.layers import NormParams
from torchtitan_mtp.models.packed import PackedMask, attend_in_blocks, attend_in_documents
from torchtitan_mtp.models.rope import apply_rope


class AttentionContext(NamedTuple):
    """What the attention of all blocks shares in one forward, made once from the batch.

    mask: None (causal); [B, 1, Q, K], a bool that is True where attention is allowed or a float
    that is added to the scores; or another form of `packed_mask`.
    ranks: those whose keys and values queries see too, where sequences are spread.
    """

    cos: Tensor  # [B or 1, S, 1, rope_dim / 2] float32
    sin: Tensor
    mask: PackedMask | None
    ranks: ContextParallel | None = None

    def run(
        self,
        block: nn.Module,
        x: Tensor,
        cache: KVCache | None = None,
        norm: NormParams | None = None,
    ) -> Tensor:
        """As `BlockContext.run`."""
        return block(x, self, cache, norm)


# The KV cache of one attention layer: stores new k, v [B, KV, S, hd], returns all of them to
# attend to, [B, KV, K, hd] each.
KVCache = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: PackedMask | None, scale: float | None = None
) -> Tensor:
    """softmax(scale * q k) v: q [B, H, Q, d], k [B, KV, K, d], v [B, KV, K, e] -> [B, H, Q, e].

    mask: that of an `AttentionContext`; scale: d^-1/2 by default.
    """
    if isinstance(mask, BlockMask):
        return attend_in_blocks(q, k, v, mask, scale)
    if isinstance(mask, Documents):
        return attend_in_documents(q, k, v, mask, scale)
    grouped = k.shape[1] != q.shape[1]
    # Not in training, which would keep the repeated mask for the backward.
    if mask is not None and mask.is_floating_point() and grouped and not torch.is_grad_enabled():
        return _attend_in_groups(q, k, v, mask, scale)
    options: dict[str, Any] = {"scale": scale, "enable_gqa": grouped}
    # A single query, the newest, sees every key, those in the cache included.
    causal = mask is None and q.shape[2] > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, **options)


def _attend_in_groups(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """A few queries of decoding, of grouped heads: a group's count as further queries of one head.
    On GPUs, kernels that take a mask take no groups, and what is left repeats keys and values."""
    size = q.shape[2]
    q = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # [B, KV, H / KV * Q, d]
    mask = mask.repeat(1, 1, q.shape[2] // size, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.unflatten(2, (-1, size)).flatten(1, 2)


class Attention(nn.Module):
    """Multi-head attention (GQA: Ainslie et al. 2023); Qwen3's with `qk_norm`, Qwen2's with
    `qkv_bias`."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = args.n_heads, args.kv_heads, args.head_dim
        kv_dim = self.n_kv_heads * self.head_dim
        self.wq = nn.Linear(args.dim, self.n_heads * self.head_dim, bias=args.qkv_bias)
        self.wk = nn.Linear(args.dim, kv_dim, bias=args.qkv_bias)
        self.wv = nn.Linear(args.dim, kv_dim, bias=args.qkv_bias)
        self.wo = nn.Linear(self.n_heads * self.head_dim, args.dim, bias=False)
        self.qk_norm = args.qk_norm
        if args.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=args.norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=args.norm_eps)
        # What a KV cache keeps of a position: heads, width of a key, width of a value.
        self.cache_shape = self.n_kv_heads, self.head_dim, self.head_dim
        # Mean width of queries and of values, over all heads, for counting FLOPs.
        self.attention_width = self.n_heads * self.head_dim

    def forward(self, x: Tensor, context: AttentionContext, cache: KVCache | None = None) -> Tensor:
        """x [B, S, D] -> [B, S, D]."""
        # [B, S, H * hd] -> [B, S, H, hd]
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q = apply_rope(q, context.cos, context.sin).transpose(1, 2)  # [B, H, S, hd]
        k = apply_rope(k, context.cos, context.sin)
        if context.ranks is not None:
            k, v = context.ranks.gather_kv(k, v)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache(k, v)
        out = attend(q, k, v, context.mask)
        return self.wo(out.transpose(1, 2).flatten(-2))
