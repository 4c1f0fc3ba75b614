"""Causal self-attention with rotary positions and grouped key-value heads."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from torchtitan_mtp.models.args import ModelArgs


class AttentionContext(NamedTuple):
    """What every block of one forward shares, made once from the batch.

    cos, sin: [B or 1, S, 1, head_dim / 2] float32. mask: None (causal); [B, 1, Q, K], a
    bool that is True where attention is allowed or a float that is added to the scores; or a
    FlexAttention `BlockMask`.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | BlockMask | None


class KVCache(Protocol):
    """Where one attention layer keeps the keys and values of earlier positions."""

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new k, v [B, KV, S, hd]; return those to attend to [B, KV, K, hd]."""
        ...


def rope_tables(args: ModelArgs, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """cos, sin of every position: [max_seq_len, head_dim / 2] float32.

    RoPE is Su et al. 2021 (arXiv 2104.09864) in Llama's interleaved layout; the scaling is Llama
    3.1's: frequencies whose wavelength exceeds the old context are divided by `factor`, those well
    inside it stay, the ones between are interpolated.
    """
    half = torch.arange(0, args.head_dim, 2, dtype=torch.float32, device=device)
    freqs = 1.0 / args.rope_theta ** (half / args.head_dim)  # [hd/2]
    if (scaling := args.rope_scaling) is not None:
        old = scaling.original_max_seq_len
        wavelength = 2 * math.pi / freqs
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        smooth = ((old / wavelength - low) / (high - low)).clamp(0, 1)
        freqs = (1 - smooth) * freqs / scaling.factor + smooth * freqs
    positions = torch.arange(args.max_seq_len, dtype=torch.float32, device=device)
    angles = torch.outer(positions, freqs)  # [max_seq_len, hd/2]
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[2j], x[2j+1]) of x [B, S, H, hd] by their position's angle."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [B, S, H, hd/2] each
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).type_as(x)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    # Uncompiled FlexAttention materialises every score; compiled, it is a kernel.
    return torch.compile(flex_attention, dynamic=False)


def document_mask(doc_ids: Tensor) -> Tensor | BlockMask:
    """Causal attention within documents, from doc_ids [B, S]."""
    batch, seq = doc_ids.shape
    if doc_ids.is_cuda:

        def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return (q >= kv) & (doc_ids[b, q] == doc_ids[b, kv])

        return create_block_mask(visible, batch, None, seq, seq, device=doc_ids.device)
    causal = torch.ones(seq, seq, dtype=torch.bool, device=doc_ids.device).tril()
    return (causal & (doc_ids[:, :, None] == doc_ids[:, None, :])).unsqueeze(1)  # [B, 1, S, S]


class Attention(nn.Module):
    """Multi-head attention (GQA: Ainslie et al. 2023) without biases; Qwen3's with `qk_norm`."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = args.n_heads, args.kv_heads
        self.head_dim = args.head_dim
        kv_dim = self.n_kv_heads * self.head_dim
        self.wq = nn.Linear(args.dim, self.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, kv_dim, bias=False)
        self.wv = nn.Linear(args.dim, kv_dim, bias=False)
        self.wo = nn.Linear(self.n_heads * self.head_dim, args.dim, bias=False)
        self.qk_norm = args.qk_norm
        if args.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=args.norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=args.norm_eps)

    def forward(self, x: Tensor, context: AttentionContext, cache: KVCache | None = None) -> Tensor:
        """x [B, S, D] -> [B, S, D]."""
        # [B, S, H * hd] -> [B, S, H, hd]
        q = self.wq(x).unflatten(-1, (-1, self.head_dim))
        k = self.wk(x).unflatten(-1, (-1, self.head_dim))
        v = self.wv(x).unflatten(-1, (-1, self.head_dim))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q = apply_rope(q, context.cos, context.sin).transpose(1, 2)  # [B, H, S, hd]
        k = apply_rope(k, context.cos, context.sin).transpose(1, 2)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v)
        grouped = self.n_kv_heads != self.n_heads
        if isinstance(context.mask, BlockMask):
            out = _compiled_flex_attention()(q, k, v, block_mask=context.mask, enable_gqa=grouped)
        else:
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=context.mask,
                # A single query, the newest, sees every key, those in the cache included.
                is_causal=context.mask is None and q.shape[2] > 1,
                enable_gqa=grouped,
            )
        return self.wo(out.transpose(1, 2).flatten(-2))
