"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; DeepSeek-V3, 2.1.1).

Keys and values of all heads come out of one narrow vector a position, c, beside which one rotated
key k^R serves all heads. With W^UK and W^UV the parts of `wkv_b`, head h has

    k_h = [W^UK_h c ; k^R],   v_h = W^UV_h c,   q_h = [q^C_h ; q^R_h]

and a KV cache needs to keep only c and k^R. Decoding absorbs W^UK_h into the query: its transpose
turns a query for k_h into one for c itself, so queries attend to the cached vectors as they are and
no position is expanded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan_mtp.models.args import ModelArgs, YaRN
from torchtitan_mtp.models.attention import AttentionContext, KVCache, attend
from torchtitan_mtp.models.rope import apply_rope


class LatentAttention(nn.Module):
    """Attention over compressed keys and values, with TorchTitan's names."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        assert args.latent is not None
        self.n_heads, self.shape = args.n_heads, args.latent
        q_rank, kv_rank = self.shape.q_lora_rank, self.shape.kv_lora_rank
        q_width = self.n_heads * self.shape.qk_head_dim
        if q_rank:
            self.wq_a = nn.Linear(args.dim, q_rank, bias=False)
            self.q_norm = nn.RMSNorm(q_rank, eps=args.norm_eps)
            self.wq_b = nn.Linear(q_rank, q_width, bias=False)
        else:
            self.wq = nn.Linear(args.dim, q_width, bias=False)
        self.wkv_a = nn.Linear(args.dim, kv_rank + self.shape.qk_rope_head_dim, bias=False)
        self.kv_norm = nn.RMSNorm(kv_rank, eps=args.norm_eps)
        kv_width = self.n_heads * (self.shape.qk_nope_head_dim + self.shape.v_head_dim)
        self.wkv_b = nn.Linear(kv_rank, kv_width, bias=False)
        self.wo = nn.Linear(self.n_heads * self.shape.v_head_dim, args.dim, bias=False)
        self.scale = self.shape.qk_head_dim**-0.5
        if isinstance(yarn := args.rope_scaling, YaRN):
            self.scale *= yarn.attention_factor(yarn.mscale_all_dim) ** 2
        # As in `Attention`; the cache keeps k^R as the key and c as the value.
        self.cache_shape = 1, self.shape.qk_rope_head_dim, kv_rank
        self.attention_width = self.n_heads * (self.shape.qk_head_dim + self.shape.v_head_dim) // 2

    def forward(self, x: Tensor, context: AttentionContext, cache: KVCache | None = None) -> Tensor:
        """x [B, S, D] -> [B, S, D]."""
        shape = self.shape
        q = self.wq_b(self.q_norm(self.wq_a(x))) if shape.q_lora_rank else self.wq(x)
        q_nope, q_rope = q.unflatten(-1, (-1, shape.qk_head_dim)).split(
            (shape.qk_nope_head_dim, shape.qk_rope_head_dim), dim=-1
        )  # [B, S, H, nope or rope]; H heads are this rank's
        c, k_rope = self.wkv_a(x).split((shape.kv_lora_rank, shape.qk_rope_head_dim), dim=-1)
        q_rope = apply_rope(q_rope, context.cos, context.sin)
        k_rope = apply_rope(k_rope.unsqueeze(2), context.cos, context.sin)
        c = self.kv_norm(c).unsqueeze(2)  # [B, S, 1, rank]
        if context.ranks is not None:
            k_rope, c = context.ranks.gather_kv(k_rope, c)
        c, k_rope = c.transpose(1, 2), k_rope.transpose(1, 2)  # [B, 1, S, rank or rope]
        if cache is not None:
            k_rope, c = cache(k_rope, c)  # [B, 1, K, rope], [B, 1, K, rank]
        if cache is not None and c.shape[2] > x.shape[1]:
            out = self._attend_absorbed(q_nope, q_rope, c, k_rope, context)
        else:  # no cached positions: expanding each once costs less than wider products
            out = self._attend_expanded(q_nope, q_rope, c, k_rope, context)
        return self.wo(out.transpose(1, 2).flatten(-2))

    def _attend_expanded(
        self, q_nope: Tensor, q_rope: Tensor, c: Tensor, k_rope: Tensor, context: AttentionContext
    ) -> Tensor:
        """With keys and values expanded for every head: [B, H, S, v]."""
        widths = self.shape.qk_nope_head_dim, self.shape.v_head_dim
        kv = self.wkv_b(c.squeeze(1)).unflatten(-1, (-1, sum(widths))).transpose(1, 2)
        k_nope, v = kv.split(widths, dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, kv.shape[1], -1, -1)), dim=-1)  # [B, H, S, qk]
        q = torch.cat((q_nope, q_rope), dim=-1).transpose(1, 2)
        return attend(q, k, v, context.mask, self.scale)

    def _attend_absorbed(
        self, q_nope: Tensor, q_rope: Tensor, c: Tensor, k_rope: Tensor, context: AttentionContext
    ) -> Tensor:
        """The same with the heads' projections absorbed into queries and outputs: [B, H, S, v]."""
        size, mask = q_nope.shape[1], context.mask
        weight = self.wkv_b.weight.unflatten(0, (self.n_heads, -1))  # [H, nope + v, rank]
        w_k, w_v = weight.split((self.shape.qk_nope_head_dim, self.shape.v_head_dim), dim=1)
        q_c = torch.einsum("bshd,hdr->bhsr", q_nope, w_k)
        q = torch.cat((q_c, q_rope.transpose(1, 2)), dim=-1)  # [B, H, S, rank + rope]
        # All heads attend to the same keys, so they count as further queries of one head.
        q = q.flatten(1, 2).unsqueeze(1)  # [B, 1, H * S, rank + rope]
        if mask is not None:
            assert isinstance(mask, Tensor)
            mask = mask.repeat(1, 1, self.n_heads, 1)  # [B, 1, H * S, K]
        else:
            assert size == 1, "several queries after earlier positions need a mask"
        k = torch.cat((c, k_rope), dim=-1)
        out = F.scaled_dot_product_attention(q, k, c, attn_mask=mask, scale=self.scale)
        out = out.view(-1, self.n_heads, size, self.shape.kv_lora_rank)
        return torch.einsum("bhsr,hdr->bhsd", out, w_v)
