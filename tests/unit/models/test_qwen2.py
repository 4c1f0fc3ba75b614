"""What Qwen2 adds to the model: biases of queries, keys and values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from small import ARGS, DEEPSEEK
from torchtitan_mtp.config import MTP
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.flavors import check_shape, model_args
from torchtitan_mtp.models.init import init_weights
from torchtitan_mtp.models.transformer import build_model
from torchtitan_mtp.mtp import add_heads

PROJECTIONS = {f"attention.{name}.bias" for name in ("wq", "wk", "wv")}


@pytest.mark.parametrize(
    ("flavor", "published"),
    [("0.5B", 494_032_768), ("1.5B", 1_543_714_304), ("7B", 7_615_616_512)],
)
def test_published_sizes(flavor, published):
    model = build_model(model_args("qwen2", flavor, tokenizer_vocab=151665))
    assert sum(p.numel() for p in model.parameters()) == published


@pytest.mark.parametrize("heads", ["parallel", "sequential"])
def test_every_block_starts_with_biases_of_zero(heads):
    model = build_model(replace(ARGS, qkv_bias=True))
    add_heads(model, MTP(heads=heads, num_future_tokens=3))
    model.to_empty(device="cpu")
    init_weights(model, seed=0)
    block = "block." if heads == "sequential" else ""
    biases = {name: p for name, p in model.named_parameters() if name.endswith(".bias")}
    blocks = [f"layers.{i}." for i in range(3)] + [f"mtp.heads.{k}.{block}" for k in range(2)]
    assert biases.keys() == {b + p for b in blocks for p in PROJECTIONS}
    assert not any(bias.any() for bias in biases.values())
    plain = build_model(ARGS)
    plain.to_empty(device="cpu")
    init_weights(plain, seed=0)
    weight = "layers.1.attention.wq.weight"  # the others start as they do without
    assert torch.equal(model.get_parameter(weight), plain.get_parameter(weight))


def test_latent_attention_has_none():
    with pytest.raises(UserError, match=r"qkv_bias = true: latent attention has no such biases"):
        check_shape(replace(DEEPSEEK, qkv_bias=True))
    with pytest.raises(UserError, match="qkv_bias"):
        model_args("deepseek_v3", "16B", tokenizer_vocab=9, changes={"qkv_bias": True})
