"""Sizes of the named models against what their makers publish."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.args import LatentArgs, ModelArgs, MoEArgs, RoPEScaling, YaRN
from torchtitan_mtp.models.flavors import flavors, model_args
from torchtitan_mtp.models.rope import rope_tables
from torchtitan_mtp.models.transformer import build_model


def parameters(flavor: str) -> int:
    """Counted on the meta device; tied weights once."""
    model = build_model(model_args("llama3", flavor, tokenizer_vocab=256))
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("flavor", "published"),
    [
        # The tensors of the released checkpoints (Llama 3.2 1B and 3B, Llama 3.1 8B, 70B, 405B).
        ("1B", 1_235_814_400),
        ("3B", 3_212_749_824),
        ("8B", 8_030_261_248),
        ("70B", 70_553_706_496),
        ("405B", 405_853_388_800),
    ],
)
def test_published_sizes(flavor, published):
    assert parameters(flavor) == published


@pytest.mark.parametrize(
    ("flavor", "dim", "layers", "heads", "kv_heads", "ffn"),
    [
        ("1B", 2048, 16, 32, 8, 8192),
        ("3B", 3072, 28, 24, 8, 8192),
        ("8B", 4096, 32, 32, 8, 14336),
        ("70B", 8192, 80, 64, 8, 28672),
        ("405B", 16384, 126, 128, 8, 53248),
        ("byte_7B", 4096, 32, 32, 32, 11008),
    ],
)
def test_published_shapes(flavor, dim, layers, heads, kv_heads, ffn):
    args = flavors["llama3"][flavor]
    assert (args.dim, args.n_layers, args.n_heads, args.kv_heads) == (dim, layers, heads, kv_heads)
    assert args.ffn_dim == ffn
    assert args.head_dim == dim // heads


@pytest.mark.parametrize(
    ("tokenizer", "given", "expected"),
    [(256, None, 256), (257, None, 320), (259, None, 320), (259, 259, 259), (259, 1000, 1000)],
)
def test_vocabulary_of_an_open_flavor(tokenizer, given, expected):
    args = model_args("llama3", "quickstart", tokenizer_vocab=tokenizer, vocab_size=given)
    assert args.vocab_size == expected


def test_a_flavors_own_vocabulary_stays():
    assert model_args("llama3", "8B", tokenizer_vocab=259).vocab_size == 128256
    assert model_args("llama3", "8B", tokenizer_vocab=259, vocab_size=512).vocab_size == 512


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("llama4", "8B", {}), r'model.name = "llama4": expected one of llama3'),
        (("llama3", "9B", {}), r'model.flavor = "9B": llama3 has quickstart, .*8B'),
        (("qwen3", "30B-A3B", {}), r'flavor = "30B-A3B": mixtures of experts .* not .* has .*32B'),
        (("llama3", "debugmodel", {}), r'model.flavor = "debugmodel".* 2048.*at least 128256'),
        (("llama3", "8B", {"vocab_size": 99}), r"model.vocab_size = 99.*at least 128256"),
    ],
)
def test_errors(arguments, message):
    family, flavor, options = arguments
    with pytest.raises(UserError, match=message):
        model_args(family, flavor, tokenizer_vocab=128256, **options)


def test_what_the_run_decides_is_filled_in():
    args = model_args(
        "llama3", "quickstart", tokenizer_vocab=9, max_seq_len=77, attn_mask_type="block_causal"
    )
    assert (args.max_seq_len, args.attn_mask_type) == (77, "block_causal")
    assert flavors["llama3"]["8B"].max_seq_len != 77  # the table itself does not change


def test_a_scaling_of_defaults_without_a_factor_asks_for_nothing() -> None:
    def scaling(**changes: float) -> object:
        changed = {"rope_scaling": changes}
        return model_args("llama3", "quickstart", tokenizer_vocab=9, changes=changed).rope_scaling

    default = model_args("llama3", "quickstart", tokenizer_vocab=9).rope_scaling
    assert scaling(low_freq_factor=1.0, high_freq_factor=4.0) == default is None
    with pytest.raises(UserError, match=r"rope_scaling\.factor"):
        scaling(low_freq_factor=2.0)


# TorchTitan v0.2.2, models/*/__init__.py and model/args.py, copied by hand.
# dim, n_layers, n_heads, n_kv_heads, head_dim, ffn, vocabulary, tied; ffn of llama3 is
# 2/3 * 4 * dim, times ffn_dim_multiplier, rounded up to multiple_of.
TORCHTITAN_DENSE = {
    ("llama3", "debugmodel"): (256, 6, 16, 16, 16, 768, 2048, False),
    ("llama3", "8B"): (4096, 32, 32, 8, 128, 14336, 128256, False),
    ("llama3", "70B"): (8192, 80, 64, 8, 128, 28672, 128256, False),
    ("llama3", "405B"): (16384, 126, 128, 8, 128, 53248, 128256, False),
    ("qwen3", "debugmodel"): (256, 8, 16, 8, 128, 3072, 2048, True),
    ("qwen3", "0.6B"): (1024, 28, 16, 8, 128, 3072, 151936, True),
    ("qwen3", "1.7B"): (2048, 28, 16, 8, 128, 6144, 151936, True),
    ("qwen3", "4B"): (2560, 36, 32, 8, 128, 9728, 151936, True),
    ("qwen3", "8B"): (4096, 36, 32, 8, 128, 12288, 151936, False),
    ("qwen3", "14B"): (5120, 40, 40, 8, 128, 17408, 151936, False),
    ("qwen3", "32B"): (5120, 64, 64, 8, 128, 25600, 151936, False),
}
# norm_eps, rope_theta, qk_norm, rotary scaling: of all of a family.
TORCHTITAN_FAMILIES = {
    "llama3": (1e-5, 500000.0, False, RoPEScaling(8.0, 1.0, 4.0, 8192)),
    "qwen3": (1e-6, 1000000.0, True, None),
}
# dim, n_layers, n_heads, inter_dim, vocabulary, q_lora_rank, attn_mask_type, mscale; then
# num_experts, moe_inter_dim, num_shared_experts, top_k, n_dense_layers, num_expert_groups,
# num_limited_groups, score_func, route_norm, route_scale, load_balance_coeff.
_LITE = ("softmax", False, 1.0, 1e-3)
TORCHTITAN_DEEPSEEK = {
    "debugmodel": (
        (256, 6, 16, 1024, 2048, 0, "causal", 0.70),
        (8, 256, 2, 3, 1, 1, 1, *_LITE),
    ),
    "16B": (
        (2048, 27, 16, 10944, 102400, 0, "block_causal", 0.70),
        (64, 1408, 2, 6, 1, 1, 1, *_LITE),
    ),
    "671B": (
        (7168, 61, 128, 18432, 129280, 1536, "block_causal", 1.0),
        (256, 2048, 1, 8, 3, 8, 4, "sigmoid", True, 2.5, 1e-3),
    ),
}


@pytest.mark.parametrize(("family", "flavor"), TORCHTITAN_DENSE)
def test_dense_flavors_are_torchtitans(family, flavor):
    args = model_args(family, flavor, tokenizer_vocab=9, max_seq_len=16384)
    sizes = (args.dim, args.n_layers, args.n_heads, args.kv_heads, args.head_dim, args.ffn_dim)
    assert (*sizes, args.vocab_size, args.tied_embeddings) == TORCHTITAN_DENSE[family, flavor]
    constants = (args.norm_eps, args.rope_theta, args.qk_norm, args.rope_scaling)
    assert constants == TORCHTITAN_FAMILIES[family]
    rest = (args.qkv_bias, args.latent, args.moe, args.final_norm_eps, args.attn_mask_type)
    assert rest == (False, None, None, None, "causal")


@pytest.mark.parametrize("flavor", TORCHTITAN_DEEPSEEK)
def test_deepseek_flavors_are_torchtitans(flavor):
    """YaRN beyond 4096 tokens only; the last norm's epsilon is torch's own, of float32."""
    (*sizes, q_rank, mask, mscale), experts = TORCHTITAN_DEEPSEEK[flavor]
    expected = ModelArgs(
        *sizes[:3],
        hidden_dim=sizes[3],
        vocab_size=sizes[4],
        latent=LatentArgs(q_rank, 512, 128, 64, 128),
        moe=MoEArgs(*experts),
        norm_eps=1e-5,
        final_norm_eps=torch.finfo(torch.float32).eps,
        rope_theta=10000.0,
        attn_mask_type=mask,
    )
    yarn = YaRN(40.0, 32.0, 1.0, mscale, mscale, 4096)
    for length, scaling in ((4096, None), (4097, yarn)):
        args = model_args("deepseek_v3", flavor, tokenizer_vocab=9, max_seq_len=length)
        assert args == replace(expected, max_seq_len=length, rope_scaling=scaling)
        block = build_model(args).layers["0"]
        growth = 1.0 if scaling is None else 0.1 * mscale * math.log(40.0) + 1.0
        assert math.isclose(block.attention.scale, 192**-0.5 * growth**2)
    # What is asked for is done at any length; one epsilon that is asked for is every norm's.
    changes = {"rope_scaling": {"factor": 20.0}, "norm_eps": 1e-6}
    args = model_args("deepseek_v3", flavor, tokenizer_vocab=9, changes=changes)
    assert args.rope_scaling == replace(yarn, factor=20.0) and args.final_norm_eps is None


@pytest.mark.parametrize(
    ("family", "flavor", "length", "kind", "config"),
    [
        (
            "llama3",
            "debugmodel",
            2048,
            "llama3",
            {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        ),
        ("deepseek_v3", "16B", 4096, "default", {}),
        ("deepseek_v3", "16B", 8192, "yarn", {"factor": 40.0, "beta_fast": 32, "beta_slow": 1}),
    ],
)
def test_frequencies_are_those_of_transformers(family, flavor, length, kind, config):
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    configs = pytest.importorskip("transformers")
    args = model_args(family, flavor, tokenizer_vocab=9, max_seq_len=length)
    old = 8192 if kind == "llama3" else 4096
    rope = {"rope_type": kind, "rope_theta": args.rope_theta, **config}
    if kind != "default":
        rope["original_max_position_embeddings"] = old
    shape = {"head_dim": args.rope_dim, "hidden_size": args.dim, "num_attention_heads": 16}
    llama = configs.LlamaConfig(**shape, max_position_embeddings=131072, rope_parameters=rope)
    if kind == "default":
        freqs = args.rope_theta ** (-torch.arange(0, args.rope_dim, 2) / args.rope_dim)
    else:
        freqs, _ = utils.ROPE_INIT_FUNCTIONS[kind](llama, "cpu")
    positions = torch.arange(length)
    cos, sin = rope_tables(args, "cpu")
    angles = positions[:, None] * freqs
    torch.testing.assert_close(cos, angles.cos(), rtol=0, atol=2e-3 * length / 2048)
    torch.testing.assert_close(sin, angles.sin(), rtol=0, atol=2e-3 * length / 2048)
    torch.testing.assert_close(torch.atan2(sin[1], cos[1]), freqs.float(), rtol=1e-5, atol=0)


def test_yarn_needs_a_base_whose_powers_differ():
    changes = {"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    with pytest.raises(UserError, match=r"^model.args.rope_theta = 1: YaRN .* more than 1$"):
        model_args("llama3", "debugmodel", tokenizer_vocab=259, changes=changes)
