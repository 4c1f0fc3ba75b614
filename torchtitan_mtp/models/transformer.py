"""A decoder-only transformer with TorchTitan's parameter names and a slot, `mtp`, for heads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torchtitan_mtp.data.targets import Batch
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.args import ModelArgs, ModelSpec
from torchtitan_mtp.models.attention import Attention, AttentionContext, KVCache
from torchtitan_mtp.models.heads import Heads, TrunkOutput, TrunkParts
from torchtitan_mtp.models.init import init_weights
from torchtitan_mtp.models.latent_attention import LatentAttention
from torchtitan_mtp.models.layers import FeedForward, NormParams, normalize
from torchtitan_mtp.models.moe import MoE
from torchtitan_mtp.models.packed import PackedMask, in_blocks, packed_mask
from torchtitan_mtp.models.rope import rope_tables
from torchtitan_mtp.models.trunk import Trunk, Unembedding


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward or mixture, each added to the residual stream.

    `depth` (0-based) sets the scale of its output projections at initialisation, and whether it is
    one of the first blocks, which stay dense.
    """

    def __init__(self, args: ModelArgs, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.attention = Attention(args) if args.latent is None else LatentAttention(args)
        self.moe: MoE | None = None
        self.feed_forward: FeedForward | None = None
        if args.moe is not None and depth >= args.moe.n_dense_layers:
            self.moe = MoE(args.dim, args.moe)
        else:
            self.feed_forward = FeedForward(args.dim, args.ffn_dim)
        self.attention_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)

    def forward(
        self,
        x: Tensor,
        context: AttentionContext,
        cache: KVCache | None = None,
        norm: NormParams | None = None,
    ) -> Tensor:
        """x [B, S, D] -> [B, S, D], normalised where a `norm` is given."""
        x = x + self.attention(self.attention_norm(x), context, cache)
        feed_forward = self.feed_forward if self.moe is None else self.moe
        assert feed_forward is not None
        x = x + feed_forward(self.ffn_norm(x))
        return x if norm is None else normalize(x, norm)

    def init_std(self, name: str) -> float:
        """Standard deviation of the weight `name` at initialisation."""
        if name.removesuffix(".weight").endswith(("wo", "w2", "w3", "router.gate")):
            return 0.02 / (2 * (self.depth + 1)) ** 0.5
        return 0.02


class Transformer(Trunk):
    """Llama-style decoder. Its parameters keep TorchTitan's names.

    attn_type: how packed documents attend, as `packed_mask` takes it.
    """

    layers: nn.ModuleDict
    attn_type = "flex"

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        assert args.vocab_size is not None, "the vocabulary's size must be known here"
        self.spec = ModelSpec(args)
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleDict(
            {str(i): TransformerBlock(args, depth=i) for i in range(args.n_layers)}
        )
        self.norm = nn.RMSNorm(args.dim, eps=args.final_norm_eps or args.norm_eps)
        self.output = Unembedding(args.dim, args.vocab_size, bias=False)
        self.tie_weights()
        self.mtp: Heads | None = None
        self.rope_cos: Tensor
        self.rope_sin: Tensor
        for name, table in zip(("rope_cos", "rope_sin"), rope_tables(args, "meta"), strict=True):
            self.register_buffer(name, table, persistent=False)

    def parts(self) -> TrunkParts:
        """As `Trunk.parts`."""
        last = self.layers[str(self.args.n_layers - 1)]
        new_norm = functools.partial(nn.RMSNorm, self.args.dim, eps=self.args.norm_eps)
        return TrunkParts(self.args, last, self.norm, last, new_norm)

    def attention_context(self, batch: Batch, dtype: torch.dtype) -> AttentionContext:
        """Rotary angles and attention mask of a batch, whose states are of `dtype`."""
        mask: PackedMask | None = None
        latent, width = self.args.latent, self.args.head_dim
        widths = (latent.qk_head_dim, latent.v_head_dim) if latent else (width, width)
        packed, ranks = self.args.attn_mask_type == "block_causal", self.context_parallel
        if ranks is not None:
            mask = ranks.mask(batch, packed, in_blocks(batch.tokens, widths))
        elif packed:
            mask = packed_mask(batch, widths, dtype, self.attn_type)
        return AttentionContext(
            self.rope_cos[batch.positions].unsqueeze(2),  # [B, S, 1, hd/2]
            self.rope_sin[batch.positions].unsqueeze(2),
            mask,
            ranks,
        )

    def _forward_trunk(self, batch: Batch, state: Tensor | None = None) -> TrunkOutput:
        x, embedded = self._embedded(batch, state)
        context = self.attention_context(batch, x.dtype)
        for block in self.trunk_layers():
            x = block(x, context)
        return TrunkOutput(x, context, embedded)

    def spans(self, max_len: int) -> Callable[..., AttentionContext]:
        """As `Trunk.spans`."""
        # As long as this generation, whatever length the model was trained at.
        args = replace(self.args, max_seq_len=max_len)
        tables = rope_tables(args, self.tok_embeddings.weight.device)

        def context(where: Any, size: int, _: int, mask: Callable[..., Tensor]) -> AttentionContext:
            # [B or 1, size, 1, hd/2]
            cos, sin = (t[where].view(-1, size, 1, t.shape[-1]) for t in tables)
            # A single query at the end, or all from the start: plain causal attention, and faster.
            plain = isinstance(where, slice) and (size == 1 or where.start == 0)
            return AttentionContext(cos, sin, None if plain else mask())

        return context

    def forward_span(
        self, text: Tensor, where: Any, context: AttentionContext, caches: Sequence[KVCache]
    ) -> tuple[Tensor, Tensor]:
        """As `Trunk.forward_span`."""
        x = z = self.tok_embeddings(text[where])
        for block, cache in zip(self.layers.values(), caches, strict=True):
            z, x = x, block(x, context, cache)
        return z, x

    def init_weights(self, seed: int) -> None:
        """As `Trunk.init_weights`."""
        init_weights(self, seed)

    def init_std(self, name: str) -> float:
        """Standard deviation of the parameter `name` at initialisation (TorchTitan's scheme)."""
        for prefix, block in self.named_blocks():
            if name.startswith(f"{prefix}."):
                return block.init_std(name.removeprefix(f"{prefix}."))  # type: ignore[operator]
        if name == "output.weight" or self.args.tied_embeddings:
            return self.args.dim**-0.5
        return 1.0

    def init_buffers(self) -> None:
        """As `Trunk.init_buffers`: the rotary tables; and zero the experts' biases."""
        device = self.rope_cos.device
        self.rope_cos, self.rope_sin = rope_tables(self.args, device)
        for _, moe in self.named_moe_layers():
            moe.init_buffers()


def build_model(args: ModelArgs, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model on the meta device, with parameters of `dtype`: shapes only, no memory."""
    try:
        with torch.device("meta"):
            return Transformer(args).to(dtype)
    except (TypeError, RuntimeError) as error:
        if "overflow" not in str(error).lower():
            raise
        raise UserError(
            "model: a size of the flavor or of [model.args] is beyond any tensor's; lower it"
        ) from error
