"""Sizes of the named models against what their makers publish."""

from __future__ import annotations

import pytest

from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.flavors import flavors, model_args
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
