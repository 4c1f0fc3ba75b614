"""Named model shapes, by family: `flavors["llama3"]["8B"]`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.args import ModelArgs, RoPEScaling

_LLAMA3_1 = RoPEScaling(factor=8.0)
_LLAMA3_2 = RoPEScaling(factor=32.0)


def _qwen3(**shape: Any) -> ModelArgs:
    # All dense Qwen3 models: heads of 128, 8 of them for keys and values, no rotary scaling.
    return ModelArgs(
        n_kv_heads=8,
        head_size=128,
        vocab_size=151936,
        qk_norm=True,
        norm_eps=1e-6,
        rope_theta=1000000.0,
        **shape,
    )


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
        # The byte-level model of Gloeckle et al. 2024, section 3.3 (n = 8 works best there).
        "byte_7B": ModelArgs(dim=4096, n_layers=32, n_heads=32, rope_theta=10000.0),
        # Sizes that no name stands for: [model.args] gives them.
        "custom": ModelArgs(),
    },
    "qwen3": {
        "0.6B": _qwen3(dim=1024, n_layers=28, n_heads=16, hidden_dim=3072, tied_embeddings=True),
        "1.7B": _qwen3(dim=2048, n_layers=28, n_heads=16, hidden_dim=6144, tied_embeddings=True),
        "4B": _qwen3(dim=2560, n_layers=36, n_heads=32, hidden_dim=9728, tied_embeddings=True),
        "8B": _qwen3(dim=4096, n_layers=36, n_heads=32, hidden_dim=12288),
        "custom": ModelArgs(qk_norm=True, norm_eps=1e-6, rope_theta=1000000.0),
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
    changes: Mapping[str, Any] | None = None,
) -> ModelArgs:
    """The shape called `flavor` in `family`, with what the run decides filled in.

    changes: fields of `ModelArgs` to set over the flavor's ([model.args]); `rope_scaling` may be a
    mapping of its fields.
    The vocabulary is `vocab_size`, else the flavor's, else the tokenizer's rounded up to a multiple
    of 64 (odd sizes are slow). Errors: an unknown name; a vocabulary smaller than the token ids;
    attention heads that don't fit.
    """
    if family not in flavors:
        raise UserError(f'model.name = "{family}": expected one of {", ".join(flavors)}')
    if flavor not in flavors[family]:
        names = ", ".join(flavors[family])
        raise UserError(f'model.flavor = "{flavor}": {family} has {names}')
    changes = dict(changes or {})
    if isinstance(scaling := changes.get("rope_scaling"), Mapping):
        changes["rope_scaling"] = RoPEScaling(**scaling)
    args = replace(flavors[family][flavor], **changes)
    _check_heads(args)
    vocab = vocab_size or args.vocab_size or 64 * -(-tokenizer_vocab // 64)
    if vocab < tokenizer_vocab:
        whose = f"model.vocab_size = {vocab}" if vocab_size else f'model.flavor = "{flavor}"'
        raise UserError(
            f"{whose}: a vocabulary of {vocab}, but the tokenizer makes ids "
            f"up to {tokenizer_vocab - 1}; set model.vocab_size to at least {tokenizer_vocab}"
        )
    return replace(args, vocab_size=vocab, max_seq_len=max_seq_len, attn_mask_type=attn_mask_type)


def _check_heads(args: ModelArgs) -> None:
    if args.head_size is None and args.dim % args.n_heads:
        raise UserError(
            f"model.args.n_heads = {args.n_heads}: dim = {args.dim} is not a multiple of it; set "
            "model.args.head_size, or another number"
        )
    if args.n_heads % args.kv_heads:
        raise UserError(
            f"model.args.n_kv_heads = {args.kv_heads}: expected a divisor of n_heads = "
            f"{args.n_heads}"
        )
    if args.head_dim % 2:
        raise UserError(
            f"model.args.head_size = {args.head_dim}: expected an even number, for rotary pairs"
        )
