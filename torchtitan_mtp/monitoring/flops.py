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
What heads learn from the trunk costs each of them head 1's logits once more: 2P for `output`.
Embedding look-ups, norms, softmax and the optimizer are left out, as there; recomputation is not
counted, for it is not work that the model needs.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from torchtitan_mtp.models.attention import Attention
from torchtitan_mtp.models.latent_attention import LatentAttention
from torchtitan_mtp.models.moe import Experts, MoE
from torchtitan_mtp.models.trunk import Trunk


def forward_backward_flops_per_token(model: Trunk, seq_len: int, from_head_1: bool = False) -> int:
    """FLOPs of one token's forward and backward, without recomputation (formula above).

    Reads the shapes of `model`, on any device (meta included), sharded or not. Frozen parameters
    are told by `requires_grad`. from_head_1: whether heads 2..n learn from head 1.
    """
    heads = [] if model.mtp is None else list(model.mtp.heads)
    # Where heads share weights, their module counts as often as it is applied.
    times = (model.spec.num_future_tokens - 1) // max(len(heads), 1)
    chosen = (model.spec.hf_config or {}).get("num_experts_per_tok", 1)
    trunk_params, trunk_attention = _count(model.layers.values(), model.output, chosen)
    head_params, head_attention = _count(heads, model.output, chosen)
    output = model.output.weight.numel()
    trunk_trained, heads_trained = (
        any(p.requires_grad for part in parts for p in part.parameters())
        for parts in (model.layers.values(), heads)
    )
    detached = not trunk_trained or (model.mtp is not None and model.mtp.detach_trunk)
    first = 3 if trunk_trained else 1  # head 1: forward; gradients of input and weight
    trunk = first * (trunk_params + output + seq_len * trunk_attention)
    own = (3 if heads_trained else 2) * head_params + 3 * seq_len * head_attention
    products = (2 if detached else 3) + from_head_1
    others = times * (own + products * output * len(heads))
    return 2 * (trunk + others)


def cost_in_layers(model: Trunk, seq_len: int, flops_per_token: int) -> float:
    """What `output` and heads cost, in layers of the trunk; flops_per_token: of the whole model."""
    params, attention = _count(model.layers.values(), model.output, 1)
    layers = 6 * (params + seq_len * attention)
    return max(0.0, (flops_per_token / layers - 1) * len(model.layers))


def _count(parts: Iterable[Any], skip: nn.Module, chosen: int) -> tuple[int, int]:
    """Active linear weights and attention widths in `parts`, without the shared module `skip`.

    Of transformers' modules, attentions are told by their output projection (a window counts as the
    whole sequence, a recurrent layer by its weights alone), and experts by their stacked weights
    [E, ...], of which a token takes `chosen`.
    """
    params = attention = 0
    for part in parts:
        for module in part.modules():
            if isinstance(module, nn.Linear) and module is not skip:
                params += module.weight.numel()
            elif isinstance(module, (Attention, LatentAttention)):
                attention += module.attention_width
            elif isinstance(module, MoE):
                routed = sum(weight.numel() for weight in module.experts.parameters())
                params += routed * module.args.top_k // module.args.num_experts
            elif isinstance(module, Experts):
                continue
            elif "Attention" in type(module).__name__:
                attention += _attention_width(module)
            elif not isinstance(module, nn.Conv1d):
                for p in module.parameters(recurse=False):  # a router's are [E, D]
                    times = chosen / p.shape[0] if p.ndim == 3 else p.ndim == 2
                    params += int(p.numel() * times)
    return params, attention


def _attention_width(module: Any) -> int:
    """Of an attention of transformers: n_heads * head_dim, or its mean where values differ."""
    out = getattr(module, "o_proj", None) or getattr(module, "out_proj", None)
    if out is None:
        return 0
    values = out.in_features
    if (width := getattr(module, "qk_head_dim", None)) is None:
        return values
    return (values + module.num_heads * width) // 2
