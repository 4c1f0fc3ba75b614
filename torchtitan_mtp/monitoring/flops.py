"""FLOPs that one token of training needs, whatever the implementation spends.

A matrix product with a weight of P parameters costs 2P FLOPs a token forward (a multiplication and
an addition) and twice that backward (the gradients of input and of weight): 6P. Attention has no
weight in its two products (scores and values), each 2 * S * width a token forward over S keys; a
causal query sees half of them on average. So, with the PaLM paper's appendix B (arXiv 2204.02311)
and nanoGPT's `estimate_mfu`, whose 12 * L * H * Q * T becomes 6 by causality:

    flops per token = 6 * matmul parameters + 6 * S * sum over attention layers of (n_heads * head_dim)

What MTP changes is how often a parameter multiplies: `output` once per head, n times in all; a
shared head module n - 1 times. Embedding look-ups, norms, softmax and the optimizer are left out,
as there; recomputation is not counted, for it is not work that the model needs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn


@dataclass(frozen=True)
class ModelFlops:
    """What multiplies for one token, counted once per application.

    Attributes:
        trunk_params: weights of the trunk's linear layers, `output` left out.
        trunk_attention: sum of n_heads * head_dim over the trunk's attention layers.
        head_params: weights of the linear layers of heads 2..n (blocks and `eh_proj`).
        head_attention: sum of n_heads * head_dim over these heads' attention layers.
        output_params: weights of the unembedding, D * V.
        num_heads: n, the applications of `output` to one token.
    """

    trunk_params: int
    trunk_attention: int
    head_params: int
    head_attention: int
    output_params: int
    num_heads: int


def count_model_flops(model: nn.Module, num_future_tokens: int = 1) -> ModelFlops:
    """Read the shapes of a `Transformer` (attributes `layers`, `output`, `mtp`), sharded or not.

    `num_future_tokens` is n. Where `mtp.heads` holds fewer than n - 1 modules (weights shared), each
    counts as often as it is applied.
    """
    output = model.output
    heads = list(model.mtp.heads) if getattr(model, "mtp", None) is not None else []
    trunk_params, trunk_attention = _count(model.layers.values(), skip=output)
    head_params, head_attention = _count(heads, skip=output)
    applications = (num_future_tokens - 1) // len(heads) if heads else 0
    return ModelFlops(
        trunk_params=trunk_params,
        trunk_attention=trunk_attention,
        head_params=head_params * applications,
        head_attention=head_attention * applications,
        output_params=output.weight.numel(),
        num_heads=1 + len(heads) * applications,
    )


def _count(parts: Iterable[nn.Module], skip: nn.Module) -> tuple[int, int]:
    """Linear weights and attention widths in `parts`, without the shared module `skip`."""
    params = attention = 0
    for part in parts:
        for module in part.modules():
            if isinstance(module, nn.Linear) and module is not skip:
                params += module.weight.numel()
            inner = getattr(module, "attention", None)
            if isinstance(inner, nn.Module):
                attention += inner.n_heads * inner.head_dim
    return params, attention


def forward_backward_flops_per_token(
    shapes: ModelFlops, seq_len: int, *, train: Literal["all", "heads"] = "all"
) -> int:
    """FLOPs of one token's forward and backward, without recomputation (formula above).

    With `train="heads"` the trunk and `output` are frozen: the trunk runs forward only (2 instead of
    6), and so does `output` for head 1; for heads 2..n it has the gradient of its input but none
    of its weight (4).
    """
    trunk = 2 * shapes.trunk_params + 2 * seq_len * shapes.trunk_attention  # forward
    heads = 2 * shapes.head_params + 2 * seq_len * shapes.head_attention
    output = 2 * shapes.output_params
    if train == "heads":
        return trunk + 3 * heads + output + 2 * output * (shapes.num_heads - 1)
    return 3 * (trunk + heads + output * shapes.num_heads)
