"""Named model shapes, by family: `flavors["llama3"]["8B"]`."""

from __future__ import annotations

from dataclasses import replace

from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.args import ModelArgs, RoPEScaling

_LLAMA3_1 = RoPEScaling(factor=8.0)
_LLAMA3_2 = RoPEScaling(factor=32.0)

flavors: dict[str, dict[str, ModelArgs]] = {
    "llama3": {
        # 1.6 M parameters over bytes: trains on two CPU cores in minutes.
        "quickstart": ModelArgs(dim=128, n_layers=4, n_heads=4, multiple_of=64, rope_theta=10000.0),
        "debugmodel": ModelArgs(
            dim=256, n_layers=6, n_heads=16, vocab_size=2048, rope_theta=500000.0
        ),
        "1B": ModelArgs(
            dim=2048,
            n_layers=16,
            n_heads=32,
            n_kv_heads=8,
            vocab_size=128256,
            ffn_dim_multiplier=1.5,
            rope_theta=500000.0,
            rope_scaling=_LLAMA3_2,
            tied_embeddings=True,
        ),
        "3B": ModelArgs(
            dim=3072,
            n_layers=28,
            n_heads=24,
            n_kv_heads=8,
            vocab_size=128256,
            rope_theta=500000.0,
            rope_scaling=_LLAMA3_2,
            tied_embeddings=True,
        ),
        "8B": ModelArgs(
            dim=4096,
            n_layers=32,
            n_heads=32,
            n_kv_heads=8,
            vocab_size=128256,
            ffn_dim_multiplier=1.3,
            multiple_of=1024,
            rope_theta=500000.0,
            rope_scaling=_LLAMA3_1,
        ),
        "70B": ModelArgs(
            dim=8192,
            n_layers=80,
            n_heads=64,
            n_kv_heads=8,
            vocab_size=128256,
            ffn_dim_multiplier=1.3,
            multiple_of=4096,
            rope_theta=500000.0,
            rope_scaling=_LLAMA3_1,
        ),
        "405B": ModelArgs(
            dim=16384,
            n_layers=126,
            n_heads=128,
            n_kv_heads=8,
            vocab_size=128256,
            ffn_dim_multiplier=1.2,
            multiple_of=4096,
            rope_theta=500000.0,
            rope_scaling=_LLAMA3_1,
        ),
        # The byte-level model of Gloeckle et al. 2024, section 3.2 (n = 8 works best there).
        "byte_7B": ModelArgs(dim=4096, n_layers=32, n_heads=32, rope_theta=10000.0),
    },
}


def model_args(
    family: str,
    flavor: str,
    *,
    tokenizer_vocab: int,
    vocab_size: int | None = None,
    max_seq_len: int = 2048,
    attn_mask_type: str = "causal",
) -> ModelArgs:
    """The shape called `flavor` in `family`, with what the run decides filled in.

    The vocabulary is `vocab_size`, else the flavor's, else the tokenizer's rounded up to a multiple
    of 64 (odd sizes are slow). Errors: an unknown name; a vocabulary smaller than the token ids.
    """
    if family not in flavors:
        raise UserError(f'model.name = "{family}": expected one of {", ".join(flavors)}')
    if flavor not in flavors[family]:
        names = ", ".join(flavors[family])
        raise UserError(f'model.flavor = "{flavor}": {family} has {names}')
    args = flavors[family][flavor]
    vocab = vocab_size or args.vocab_size or 64 * -(-tokenizer_vocab // 64)
    if vocab < tokenizer_vocab:
        whose = f"model.vocab_size = {vocab}" if vocab_size else f'model.flavor = "{flavor}"'
        raise UserError(
            f"{whose}: a vocabulary of {vocab}, but the tokenizer makes ids "
            f"up to {tokenizer_vocab - 1}; set model.vocab_size to at least {tokenizer_vocab}"
        )
    return replace(args, vocab_size=vocab, max_seq_len=max_seq_len, attn_mask_type=attn_mask_type)
