"""What Qwen3 adds to the model: normalised queries and keys, heads as wide as they are told."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from small import ARGS, small_model
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.args import RoPEScaling
from torchtitan_mtp.models.attention import AttentionContext
from torchtitan_mtp.models.flavors import model_args
from torchtitan_mtp.models.rope import apply_rope
from torchtitan_mtp.models.transformer import build_model


@pytest.mark.parametrize(
    ("flavor", "published"),
    [("0.6B", 596_049_920), ("1.7B", 1_720_574_976), ("4B", 4_022_468_096), ("8B", 8_190_735_360)],
)
def test_published_sizes(flavor, published):
    model = build_model(model_args("qwen3", flavor, tokenizer_vocab=151669))
    assert sum(p.numel() for p in model.parameters()) == published


def test_queries_and_keys_are_normalised_head_by_head():
    attention = small_model(qk_norm=True, head_size=6).layers["0"].attention
    x = torch.randn(2, 5, ARGS.dim, generator=torch.Generator().manual_seed(0))
    angles = torch.arange(15.0).view(1, 5, 1, 3)
    context = AttentionContext(angles.cos(), angles.sin(), None)

    def head(linear, norm, h):  # one head alone: [2, 5, 6], normalised and rotated
        y = (x @ linear.weight.T)[..., 6 * h : 6 * h + 6]
        y = y / (y.pow(2).mean(-1, keepdim=True) + ARGS.norm_eps).sqrt() * norm.weight
        return apply_rope(y.unsqueeze(2), context.cos, context.sin).squeeze(2)

    outputs = []
    for h in range(4):
        q = head(attention.wq, attention.q_norm, h)
        k = head(attention.wk, attention.k_norm, h // 2)
        v = (x @ attention.wv.weight.T)[..., 6 * (h // 2) : 6 * (h // 2) + 6]
        scores = q @ k.mT / 6**0.5 + torch.full((5, 5), -torch.inf).triu(1)
        outputs.append(scores.softmax(-1) @ v)
    expected = F.linear(torch.cat(outputs, -1), attention.wo.weight)
    torch.testing.assert_close(attention(x, context), expected, rtol=1e-4, atol=1e-6)


def test_sizes_over_a_flavors():
    changes = {
        "dim": 96,
        "n_heads": 4,
        "n_kv_heads": 2,
        "hidden_dim": 100,
        "rope_scaling": {"factor": 2.0, "original_max_seq_len": 64},
    }
    args = model_args("llama3", "custom", tokenizer_vocab=259, changes=changes)
    assert (args.dim, args.head_dim, args.ffn_dim, args.kv_heads) == (96, 24, 100, 2)
    assert args.rope_scaling == RoPEScaling(factor=2.0, original_max_seq_len=64)
    assert model_args("llama3", "custom", tokenizer_vocab=259).dim == 4096  # the table is as it was


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 30, "n_heads": 4}, "not a multiple"),
        ({"n_heads": 4, "n_kv_heads": 3}, "divisor of n_heads = 4"),
        ({"dim": 12, "n_heads": 4}, "even number"),
    ],
)
def test_heads_that_do_not_fit(changes, message):
    with pytest.raises(UserError, match=message):
        model_args("llama3", "custom", tokenizer_vocab=259, changes=changes)
