"""The two head families: how hidden states for t+1 .. t+n come out of one trunk.

Parallel heads (Gloeckle et al. 2024, arXiv 2404.19737, section 2): with z the trunk's state,

    h_k = norm(block_k(z)),  k = 1..n;          block_1 is the model's own last layer.

Sequential heads (DeepSeek-V3, arXiv 2412.19437, section 2.2, equations 21 to 23): h_1 is the whole
ordinary model, after its final norm, and for k = 2..n

    h_k = norm_k(block_k(M_k [enorm_k(emb(t[i+k-1])) ; hnorm_k(h_{k-1})])).

(With `trunk_state = "raw"`, as vLLM runs MiMo, head 2 reads the state before the final norm in
place of h_1.)

Both share the embedding, the unembedding and the rotary positions with the trunk. Head k at
position i predicts t[i+k]; head 1 is next-token prediction.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan_mtp.config import TrunkState
from torchtitan_mtp.data.targets import Batch
from torchtitan_mtp.models.attention import AttentionContext, KVCache
from torchtitan_mtp.models.transformer import Transformer


class ParallelHeads(nn.Module):
    """Heads 2..n beside the model's last layer, which is head 1."""

    family = "parallel"

    def __init__(self, model: Transformer, num_future_tokens: int, detach_trunk: bool) -> None:
        super().__init__()
        last = last_layer(model)
        self.num_future_tokens = num_future_tokens
        self.detach_trunk = detach_trunk
        self.heads = nn.ModuleList(copy.deepcopy(last) for _ in range(num_future_tokens - 1))

    def trunk(self, model: Transformer, batch: Batch) -> tuple[Tensor, AttentionContext]:
        """The state z [B, S, D] under all heads, and the attention context they share."""
        return model.encode(batch, n_layers=len(model.layers) - 1)

    def reached(self, k: int) -> list[nn.Module]:
        """The modules under head k's loss, k = 2..n."""
        return [self.heads[k - 2]]

    def head_blocks(self, model: Transformer) -> list[nn.Module]:
        """The blocks of heads 1..n."""
        return [last_layer(model), *self.heads]

    def hidden(self, model: Transformer, k: int, z: Tensor, context: AttentionContext) -> Tensor:
        """Head k's hidden state [B, S, D] from the trunk's z [B, S, D].

        The final norm is part of the block's call, so that a checkpointed or compiled block keeps
        nothing for it.
        """
        block = self.head_blocks(model)[k - 1]
        scale: Tensor = model.norm.weight
        # (Without gradients there is nothing to detach, and one kind of call less to compile.)
        if self.detach_trunk and k > 1 and torch.is_grad_enabled():
            z, scale = z.detach(), scale.detach()
        return block(z, context, norm=scale)

    def forward(self, model: Transformer, batch: Batch) -> list[Tensor]:
        """n hidden states [B, S, D]."""
        z, context = self.trunk(model, batch)
        return [self.hidden(model, k, z, context) for k in range(1, self.num_future_tokens + 1)]


class SequentialHead(nn.Module):
    """One MTP module: the next hidden state from the previous one and the token in between."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        dim, eps, self.trunk_eps = model.args.dim, model.args.norm_eps, model.norm.eps
        self.enorm = nn.RMSNorm(dim, eps=eps)
        self.hnorm = nn.RMSNorm(dim, eps=eps)
        self.eh_proj = nn.Linear(2 * dim, dim, bias=False)
        self.block = copy.deepcopy(last_layer(model))
        self.norm = nn.RMSNorm(dim, eps=eps)

    def forward(
        self,
        h: Tensor,
        emb: Tensor,
        context: AttentionContext,
        cache: KVCache | None = None,
        trunk_norm: Tensor | None = None,
    ) -> Tensor:
        """h_k [B, S, D], normalised, from h = h_{k-1} and emb [B, S, D].

        With `trunk_norm`, the scale [D] of the trunk's final norm, h is the trunk's state before
        that norm, which is taken here.
        """
        if trunk_norm is not None:
            h = F.rms_norm(h, trunk_norm.shape, trunk_norm, self.trunk_eps)
        x = self.eh_proj(torch.cat((self.enorm(emb), self.hnorm(h)), dim=-1))  # [B, S, 2D] -> D
        return self.norm(self.block(x, context, cache))

    def init_std(self, name: str) -> float:
        """Standard deviation of the weight `name` at initialisation: its block's, else 0.02."""
        return self.block.init_std(name.removeprefix("block."))  # type: ignore[operator]


class SequentialHeads(nn.Module):
    """A chain of modules behind the whole model; with `share_weights` one module, n - 1 times.

    trunk_state: what the first of them reads of the trunk (`mtp.trunk_state`).
    """

    family = "sequential"

    def __init__(
        self,
        model: Transformer,
        num_future_tokens: int,
        detach_trunk: bool,
        share_weights: bool,
        trunk_state: TrunkState = "normalized",
    ) -> None:
        super().__init__()
        self.num_future_tokens = num_future_tokens
        self.detach_trunk = detach_trunk
        self.trunk_state = trunk_state
        modules = 1 if share_weights else num_future_tokens - 1
        self.heads = nn.ModuleList(SequentialHead(model) for _ in range(modules))

    def module(self, k: int) -> nn.Module:
        """The module that computes h_k, k = 2..n."""
        return self.heads[min(k - 2, len(self.heads) - 1)]

    def reached(self, k: int) -> list[nn.Module]:
        """The modules under head k's loss, k = 2..n: all up to its own."""
        return list(self.heads[: k - 1])

    def trunk(self, model: Transformer, batch: Batch) -> tuple[Tensor, Tensor, AttentionContext]:
        """Embeddings of t[0..S+n-2] [B, S+n-1, D], the state before the final norm [B, S, D], the
        context all blocks share."""
        # Each token once, although up to n heads read it: the batch is a stretch of one window.
        tokens = torch.cat((batch.tokens, batch.future_tokens[:, -1]), dim=1)  # [B, S+n-1]
        embedded = model.tok_embeddings(tokens)
        x = embedded[:, : batch.tokens.shape[1]].contiguous()
        return embedded, *model.encode(batch, embedded=x)

    def ahead(self, embedded: Tensor, k: int) -> Tensor:
        """What head k reads of `trunk`'s embeddings: those of t[i+k-1] [B, S, D], a view."""
        seq_len = embedded.shape[1] - self.num_future_tokens + 1
        return embedded[:, k - 1 : k - 1 + seq_len]

    def hidden(
        self, model: Transformer, k: int, h: Tensor, emb: Tensor, context: AttentionContext
    ) -> Tensor:
        """h_k [B, S, D], k = 2..n, from h_{k-1} and `ahead` [B, S, D]; h_2 from `trunk`'s state,
        whose norm is part of the module's call: what is kept for the backward is that state."""
        if k > 2:
            return self.module(k)(h, emb, context)
        scale: Tensor = model.norm.weight
        if self.detach_trunk and torch.is_grad_enabled():
            h, scale = h.detach(), scale.detach()
        trunk_norm = scale if self.trunk_state == "normalized" else None
        return self.module(k)(h, emb, context, trunk_norm=trunk_norm)

    def forward(self, model: Transformer, batch: Batch) -> list[Tensor]:
        """n hidden states [B, S, D]."""
        embedded, h, context = self.trunk(model, batch)
        hiddens = [model.norm(h)]
        if self.detach_trunk:
            embedded = embedded.detach()
        for k in range(2, self.num_future_tokens + 1):
            h = self.hidden(model, k, h, self.ahead(embedded, k), context)
            hiddens.append(h)
        return hiddens


def last_layer(model: Transformer) -> nn.Module:
    """The trunk's last block."""
    return model.layers[str(len(model.layers) - 1)]
