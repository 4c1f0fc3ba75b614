"""Named model shapes, by family: `flavors["llama3"]["8B"]`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.args import (
    ROPE_SCALINGS,
    LatentArgs,
    ModelArgs,
    MoEArgs,
    RoPEScaling,
    YaRN,
)

# TorchTitan scales the rotary frequencies of all its sizes as Llama 3.1 does.
_llama3 = partial(
    ModelArgs, n_kv_heads=8, vocab_size=128256, rope_theta=5e5, rope_scaling=RoPEScaling(factor=8.0)
)
_llama3_2 = partial(_llama3, rope_scaling=RoPEScaling(factor=32.0), tied_embeddings=True)

# Dense Qwen2.5 has biases of queries, keys and values; dense Qwen3 norms of queries and keys, and
# heads of 128, 8 of them for keys and values. Neither scales rotary frequencies.
_qwen = partial(ModelArgs, norm_eps=1e-6, rope_theta=1e6)
_qwen2 = partial(_qwen, qkv_bias=True, vocab_size=151936)
_qwen3 = partial(_qwen, qk_norm=True, vocab_size=151936, n_kv_heads=8, head_size=128)

# Experts: how many, their width, shared ones, chosen ones, dense layers, groups, chosen groups.
_v2_moe = partial(MoEArgs, score_func="softmax", route_norm=False)
_v3_moe = partial(MoEArgs, route_scale=2.5)

# TorchTitan's eps: 1e-5, and torch's own of float32 for the last norm, which names none. Latent
# attention: ranks of queries and of keys and values, widths unrotated, rotated and of values.
_deepseek = partial(ModelArgs, norm_eps=1e-5, final_norm_eps=2.0**-23)
_tiny = partial(ModelArgs, norm_eps=1e-6, latent=LatentArgs(64, 32, 16, 16, 32))
_YARN_LITE = YaRN(mscale=0.70, mscale_all_dim=0.70)  # DeepSeek-V2-Lite has 0.707
_v2_lite = partial(_deepseek, latent=LatentArgs(), rope_scaling=_YARN_LITE)
_MASK: dict[str, Any] = {"attn_mask_type": "block_causal"}
_v3 = partial(
    _deepseek, latent=LatentArgs(1536), moe=_v3_moe(256, 2048, 1, 8, 3, 8, 4), rope_scaling=YaRN()
)

# Sizes that TorchTitan v0.2.2 has under the same name mean the same numbers (docs/torchtitan.md).
# Width, layers, attention heads; then what has a name.
flavors: dict[str, dict[str, ModelArgs]] = {
    "llama3": {
        # 1.6 M parameters over bytes: trains on two CPU cores in minutes.
        "quickstart": ModelArgs(128, 4, 4, multiple_of=64),
        "debugmodel": _llama3(256, 6, 16, n_kv_heads=None, vocab_size=2048),
        "1B": _llama3_2(2048, 16, 32, ffn_dim_multiplier=1.5),
        "3B": _llama3_2(3072, 28, 24),
        "8B": _llama3(4096, 32, 32, ffn_dim_multiplier=1.3, multiple_of=1024),
        "70B": _llama3(8192, 80, 64, ffn_dim_multiplier=1.3, multiple_of=4096),
        "405B": _llama3(16384, 126, 128, ffn_dim_multiplier=1.2, multiple_of=4096),
        # The byte-level model of Gloeckle et al. 2024, section 3.3 (n = 8 works best there).
        "byte_7B": ModelArgs(4096, 32, 32),
        # Sizes that no name stands for: [model.args] gives them.
        "custom": ModelArgs(),
    },
    "qwen2": {  # Qwen2.5's sizes
        "0.5B": _qwen2(896, 24, 14, n_kv_heads=2, hidden_dim=4864, tied_embeddings=True),
        "1.5B": _qwen2(1536, 28, 12, n_kv_heads=2, hidden_dim=8960, tied_embeddings=True),
        "7B": _qwen2(3584, 28, 28, n_kv_heads=4, hidden_dim=18944, vocab_size=152064),
        "custom": _qwen(qkv_bias=True),
    },
    "qwen3": {
        "debugmodel": _qwen3(256, 8, 16, hidden_dim=3072, vocab_size=2048, tied_embeddings=True),
        "0.6B": _qwen3(1024, 28, 16, hidden_dim=3072, tied_embeddings=True),
        "1.7B": _qwen3(2048, 28, 16, hidden_dim=6144, tied_embeddings=True),
        "4B": _qwen3(2560, 36, 32, hidden_dim=9728, tied_embeddings=True),
        "8B": _qwen3(4096, 36, 32, hidden_dim=12288),
        "14B": _qwen3(5120, 40, 40, hidden_dim=17408),
        "32B": _qwen3(5120, 64, 64, hidden_dim=25600),
        "custom": _qwen(qk_norm=True),
    },
    "deepseek_v3": {
        # 1.7 M parameters over bytes, 0.7 M of them active: trains on two CPU cores in minutes.
        "quickstart": _tiny(128, 4, 4, hidden_dim=384, moe=_v3_moe(16, 64, 1, 4, 1, 4, 2)),
        "debugmodel": _v2_lite(
            256, 6, 16, vocab_size=2048, hidden_dim=1024, moe=_v2_moe(8, 256, 2, 3)
        ),
        # DeepSeek-V2-Lite's shape, as TorchTitan has it under this name.
        "16B": _v2_lite(
            2048, 27, 16, vocab_size=102400, hidden_dim=10944, moe=_v2_moe(64, 1408, 2, 6), **_MASK
        ),
        "671B": _v3(7168, 61, 128, vocab_size=129280, hidden_dim=18432, **_MASK),
        "custom": ModelArgs(latent=LatentArgs(), moe=MoEArgs(), norm_eps=1e-6),
    },
}

# What flavors had of these until they became TorchTitan's: runs that were begun with it keep it.
_DEEPSEEKS = {"norm_eps": 1e-6, "final_norm_eps": None, "attn_mask_type": "causal"}
_LITES = _DEEPSEEKS | {"rope_scaling": YaRN(mscale=0.707, mscale_all_dim=0.707)}
EARLIER_FLAVORS: dict[tuple[str, str], dict[str, Any]] = {
    ("llama3", "debugmodel"): {"rope_scaling": None},
    ("deepseek_v3", "debugmodel"): _LITES,
    ("deepseek_v3", "16B"): _LITES,
    ("deepseek_v3", "671B"): _DEEPSEEKS | {"rope_scaling": YaRN()},
}
_MIXTURES = ("debugmodel_moe", "30B-A3B", "235B-A22B")  # TorchTitan's, of Qwen3


def model_args(
    family: str,
    flavor: str,
    *,
    tokenizer_vocab: int,
    vocab_size: int | None = None,
    max_seq_len: int = 2048,
    trained_len: int | None = None,
    attn_mask_type: str | None = None,
    changes: Mapping[str, Any] | None = None,
    earlier: bool = False,
) -> ModelArgs:
    """The shape called `flavor` in `family`, with what the run decides filled in.

    changes: fields of `ModelArgs` to set over the flavor's ([model.args]); `rope_scaling`, `latent`
    and `moe` may be mappings of their fields. earlier: take the flavor as in `EARLIER_FLAVORS`.
    A flavor's own YaRN holds where `trained_len` (default: `max_seq_len`) exceeds the context that
    it extends, as in TorchTitan; one that `changes` speaks of, always.
    The vocabulary is `vocab_size`, else the flavor's, else the tokenizer's rounded up to a multiple
    of 64 (odd sizes are slow). Errors: an unknown name; a vocabulary smaller than the token ids;
    attention heads or experts that don't fit.
    """
    if family not in flavors:
        raise UserError(f'model.name = "{family}": expected one of {", ".join(flavors)}, hf')
    if flavor not in flavors[family]:
        names = ", ".join(flavors[family])
        mixture = family == "qwen3" and flavor in _MIXTURES
        yet = "mixtures of experts are not here yet for Qwen3, which" if mixture else family
        raise UserError(f'model.flavor = "{flavor}": {yet} has {names}')
    args, changes = flavors[family][flavor], changes or {}
    yarn = args.rope_scaling if isinstance(args.rope_scaling, YaRN) else None
    if earlier:
        args = replace(args, **EARLIER_FLAVORS.get((family, flavor), {}))
    elif yarn and "rope_scaling" not in changes:
        extended = (trained_len or max_seq_len) > yarn.original_max_seq_len
        args = replace(args, rope_scaling=yarn if extended else None)
    args = _changed(args, changes)
    check_shape(args)
    vocab = vocab_size or args.vocab_size or 64 * -(-tokenizer_vocab // 64)
    if vocab < tokenizer_vocab:
        whose = f"model.vocab_size = {vocab}" if vocab_size else f'model.flavor = "{flavor}"'
        raise UserError(
            f"{whose}: a vocabulary of {vocab}, but the tokenizer makes ids "
            f"up to {tokenizer_vocab - 1}; take the model's own tokenizer or, for a new model, set "
            f"model.vocab_size to at least {tokenizer_vocab}"
        )
    mask = attn_mask_type or args.attn_mask_type
    return replace(args, vocab_size=vocab, max_seq_len=max_seq_len, attn_mask_type=mask)


def _changed(args: ModelArgs, changes: Mapping[str, Any]) -> ModelArgs:
    changes = dict(changes)
    if "norm_eps" in changes:  # every norm's
        changes.setdefault("final_norm_eps", None)
    for name, kind in (("latent", LatentArgs), ("moe", MoEArgs)):
        if isinstance(part := changes.get(name), Mapping):
            changes[name] = replace(getattr(args, name) or kind(), **part)
    if isinstance(part := changes.get("rope_scaling"), Mapping):
        changes["rope_scaling"] = _scaling(args.rope_scaling, dict(part))
    return replace(args, **changes)


def _scaling(
    flavors: RoPEScaling | YaRN | None, changes: dict[str, Any]
) -> RoPEScaling | YaRN | None:
    """The scaling of a mapping: over the flavor's if it is of that kind, else from scratch. A
    factor of 1 is none."""
    default = RoPEScaling if flavors is None else type(flavors)
    kind = ROPE_SCALINGS.get(changes.pop("rope_type", ""), default)
    scaling = flavors if isinstance(flavors, kind) else kind()
    if scaling is not flavors and "factor" not in changes:
        if changes.items() <= vars(scaling).items():  # as a written config has them
            return flavors
        raise UserError(
            "model.args.rope_scaling: the flavor has no scaling of this kind to change; set "
            "model.args.rope_scaling.factor too, or none of its keys"
        )
    for key in changes:
        if key not in vars(scaling):
            raise UserError(
                f"model.args.rope_scaling.{key}: is not of this kind of scaling, which has "
                f"{', '.join(vars(scaling))}; set model.args.rope_scaling.rope_type"
            )
    scaling = replace(scaling, **changes)
    return None if scaling.factor == 1 else scaling


def check_shape(args: ModelArgs) -> None:
    """Errors: attention heads, rotary positions or experts that don't fit."""
    even = "expected an even number, for rotary pairs"
    if isinstance(args.rope_scaling, YaRN) and args.rope_theta <= 1:
        raise UserError(
            f"model.args.rope_theta = {args.rope_theta:g}: YaRN counts turns by powers of it; "
            "expected more than 1"
        )
    if args.latent is not None:
        if args.qkv_bias:
            raise UserError(
                "model.args.qkv_bias = true: latent attention has no such biases; set it to false, "
                "or take a family without latent attention"
            )
        if args.rope_dim % 2:
            raise UserError(f"model.args.latent.qk_rope_head_dim = {args.rope_dim}: {even}")
    else:
        if args.head_size is None and args.dim % args.n_heads:
            raise UserError(
                f"model.args.n_heads = {args.n_heads}: dim = {args.dim} is not a multiple of it; "
                "set model.args.head_size, or another number"
            )
        if args.n_heads % args.kv_heads:
            divisor = f"expected a divisor of n_heads = {args.n_heads}"
            raise UserError(f"model.args.n_kv_heads = {args.kv_heads}: {divisor}")
        if args.head_dim % 2:
            raise UserError(f"model.args.head_size = {args.head_dim}: {even}")
    if (moe := args.moe) is not None:
        groups, limited = moe.num_expert_groups, moe.num_limited_groups
        if moe.num_experts % groups or limited > groups:
            raise UserError(
                f"model.args.moe.num_expert_groups = {groups}: expected a divisor of num_experts = "
                f"{moe.num_experts}, and at least num_limited_groups = {limited}"
            )
        size = moe.num_experts // groups
        if limited < groups and size < 2:
            raise UserError(
                f"model.args.moe.num_expert_groups = {groups}: groups of one expert; a group is "
                f"chosen by its two best, so expected at most {moe.num_experts // 2}"
            )
        if moe.top_k > limited * size:
            raise UserError(
                f"model.args.moe.top_k = {moe.top_k}: expected at most {limited * size}, the "
                f"experts of num_limited_groups = {limited} groups"
            )
