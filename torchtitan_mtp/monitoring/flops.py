"""FLOPs that one token of training needs, whatever the implementation spends.

A matrix product with a weight of P parameters costs 2P FLOPs a token forward (a multiplication and
an addition) and twice that backward (the gradients of input and of weight): 6P. Attention has no
weight in its two products (scores and values), each 2 * S * width a token forward over S keys; a
causal query sees half of them on average. So, with the PaLM paper's appendix B (arXiv 2204.02311)
and nanoGPT's `estimate_mfu`, whose 12 * L * H * Q * T becomes 6 by causality:

    flops per token = 6 * matmul parameters + 6 * S * sum over attentions of (n_heads * head_dim)

Of routed experts a token multiplies with top_k in num_experts: their active parameters count. Where
keys and values differ in width (latent attention), head_dim is their mean.

What MTP changes is how often a parameter multiplies: `output` once per head, n times in all; a
shared head module n - 1 times. A frozen trunk costs its forward only, and where heads leave the
trunk alone (frozen or detached) their use of `output` lacks the gradient of its weight: 4 for 6, as
for all weights of frozen heads.
Embedding look-ups, norms, softmax and the optimizer are left out, as there; recomputation is not
counted, for it is not work that the model needs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from torchtitan_mtp.models.attention import Attention
from torchtitan_mtp.models.latent_attention import LatentAttention
from torchtitan_mtp.models.moe import MoE
from torchtitan_mtp.models.transformer import Transformer


@dataclass(frozen=True)
class ModelFlops:
    """What multiplies for one token, counted once per application.

    Attributes:
        trunk_params: active weights of the trunk's linear layers, `output` left out.
        trunk_attention: sum of n_heads * head_dim over the trunk's attention layers.
        head_params: active weights of the linear layers of heads 2..n (blocks and `eh_proj`).
        head_attention: sum of n_heads * head_dim over these heads' attention layers.
        output_params: weights of the unembedding, D * V.
        num_heads: n, the applications of `output` to one token.
        trunk_trained: whether head 1 trains the trunk and `output`.
        detached: whether heads 2..n train nothing but themselves.
        heads_trained: whether they train themselves.
    """

    trunk_params: int
    trunk_attention: int
    head_params: int
    head_attention: int
    output_params: int
    num_heads: int
    trunk_trained: bool = True
    detached: bool = False
    heads_trained: bool = True


def count_model_flops(model: Transformer) -> ModelFlops:
    """Read the shapes of `model`, on any device (meta included), sharded or not.

    Where its `mtp` holds fewer than n - 1 modules (weights shared), each counts as often as it is
    applied. Frozen parameters are told by `requires_grad`.
    """
    output, mtp = model.output, model.mtp
    trunk_params, trunk_attention = _count(model.layers.values(), skip=output)
    trained = any(p.requires_grad for p in model.layers.parameters())
    heads = [] if mtp is None else list(mtp.heads)
    head_params, head_attention = _count(heads, skip=output)
    applications = (mtp.num_future_tokens - 1) // len(heads) if heads else 0
    return ModelFlops(
        trunk_params=trunk_params,
        trunk_attention=trunk_attention,
        head_params=head_params * applications,
        head_attention=head_attention * applications,
        output_params=output.weight.numel(),
        num_heads=1 + len(heads) * applications,
        trunk_trained=trained,
        detached=not trained or (mtp is not None and mtp.detach_trunk),
        heads_trained=any(p.requires_grad for head in heads for p in head.parameters()),
    )


def _count(parts: Iterable[Any], skip: nn.Module) -> tuple[int, int]:
    """Active linear weights and attention widths in `parts`, without the shared module `skip`."""
    params = attention = 0
    for part in parts:
        for module in part.modules():
            if isinstance(module, nn.Linear) and module is not skip:
                params += module.weight.numel()
            elif isinstance(module, (Attention, LatentAttention)):
                attention += module.width
            elif isinstance(module, MoE):
                routed = sum(weight.numel() for weight in module.experts.parameters())
                params += routed * module.args.top_k // module.args.num_experts
    return params, attention


def forward_backward_flops_per_token(shapes: ModelFlops, seq_len: int) -> int:
    """FLOPs of one token's forward and backward, without recomputation (formula above)."""
    n = shapes.num_heads
    trunk = 2 * shapes.trunk_params + 2 * seq_len * shapes.trunk_attention  # forward
    heads = 2 * shapes.head_params + 2 * seq_len * shapes.head_attention
    output = 2 * shapes.output_params
    first = 3 if shapes.trunk_trained else 1  # head 1: forward; gradients of input and weight
    others = 2 if shapes.detached else 3
    own = 0 if shapes.heads_trained else 2 * shapes.head_params  # no gradient of these weights
    return first * (trunk + output) + 3 * heads - own + others * output * (n - 1)
