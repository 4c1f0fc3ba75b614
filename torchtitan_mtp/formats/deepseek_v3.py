"""DeepseekV3ForCausalLM: names and config.json, both ways.

Its rotary layout is ours (interleaved pairs), so no rows change places. Experts are tensors of
their own there and parts of stacked ones here; MTP modules are layers behind the last, each with
copies of the shared embedding and unembedding, which are left out.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats.configs import Reader, read_rope, read_shape, write_shape
from torchtitan_mtp.formats.names import WORDS, Names, hf_entries, repeats_of
from torchtitan_mtp.models.args import LatentArgs, ModelArgs, ModelSpec, MoEArgs, YaRN

_WORDS = WORDS | {
    "wkv_a": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "wkv_b": "kv_b_proj",
    "wq_a": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "wq_b": "q_b_proj",
    "moe": "mlp",
    "router": "",
    "expert_bias": "gate.e_score_correction_bias",
}
_LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
# Whole numbers of MoEArgs, by what config.json calls them; and what has one value here.
_MOE = {
    "n_routed_experts": "num_experts",
    "moe_intermediate_size": "hidden_dim",
    "n_shared_experts": "num_shared_experts",
    "num_experts_per_tok": "top_k",
    "first_k_dense_replace": "n_dense_layers",
    "n_group": "num_expert_groups",
    "topk_group": "num_limited_groups",
}
_FIXED = {"rope_interleave": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
_EPS = 1e-6  # what transformers gives the norms within attention, whatever config.json says


def names(spec: ModelSpec) -> Names:
    """Every tensor of a trunk and its modules."""
    entries = hf_entries(spec, words=_WORDS)
    for at, entry in enumerate(entries):
        if ".moe.experts." in entry.ours:
            mlp, _, matrix = entry.theirs[0].partition(".experts.")
            experts = range(_moe(spec).num_experts)
            theirs = tuple(f"{mlp}.experts.{e}.{matrix}.weight" for e in experts)
            entries[at] = replace(entry, theirs=theirs, stacked=True)
    return Names(entries, repeats=repeats_of(spec, behind=True))


def _moe(spec: ModelSpec) -> MoEArgs:
    assert spec.args.moe is not None
    return spec.args.moe


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """DeepseekV3Config.

    Raises:
        UserError: a model that this class computes otherwise.
    """
    args, moe, latent = spec.args, _moe(spec), spec.args.latent
    assert latent is not None
    if misfit := _misfit(spec):
        raise UserError(f"the model has {misfit}")
    return write_shape(args, "DeepseekV3ForCausalLM", "deepseek_v3", type="yarn") | {
        "num_nextn_predict_layers": spec.num_modules,
        "num_key_value_heads": args.n_heads,
        **asdict(latent) | {"q_lora_rank": latent.q_lora_rank or None},
        **{theirs: getattr(moe, ours) for theirs, ours in _MOE.items()},
        "moe_layer_freq": 1,
        "norm_topk_prob": moe.route_norm,
        "routed_scaling_factor": moe.route_scale,
        **_FIXED,
    }


def _misfit(spec: ModelSpec) -> str:
    args, moe = spec.args, _moe(spec)
    if moe.score_func != "sigmoid":
        return f'score_func = "{moe.score_func}", and its router takes sigmoids'
    if not moe.num_shared_experts:
        return "no shared expert, and it has one at least"
    if moe.num_experts < 2 * moe.num_expert_groups:
        return "groups of one expert, and its router looks at the two best of each"
    if args.norm_eps != _EPS:
        return f"norm_eps = {args.norm_eps}, and the norms within its attention have {_EPS}"
    if args.rope_scaling is not None and not isinstance(args.rope_scaling, YaRN):
        return "Llama 3.1's rotary scaling, and it has YaRN's"
    if spec.num_modules and moe.n_dense_layers >= args.n_layers:
        return "dense layers alone, and its modules are mixtures"
    return ""


def read_config(reader: Reader) -> ModelArgs:
    """The trunk of a DeepseekV3Config, released ones included."""
    heads = reader.integer("num_attention_heads")
    same = {"hidden_act": "silu", "attention_bias": False, "rms_norm_eps": _EPS}
    same |= {"moe_layer_freq": 1, "num_key_value_heads": heads}
    for key, only in (same | _FIXED).items():
        reader.expect(key, only)
    reader.count("n_routed_experts")
    moe: dict[str, Any] = {
        ours: reader.integer(theirs, zero=ours == "n_dense_layers") for theirs, ours in _MOE.items()
    }
    theta, yarn = _rope(reader)
    return ModelArgs(
        **read_shape(reader, longest=4096),
        latent=LatentArgs(
            reader.integer("q_lora_rank", 0, zero=True), *map(reader.integer, _LATENT)
        ),
        moe=MoEArgs(
            **moe,
            route_norm=reader.flag("norm_topk_prob", True),
            route_scale=float(reader.number("routed_scaling_factor")),
        ),
        norm_eps=_EPS,
        rope_theta=theta,
        rope_scaling=yarn,
    )


def _rope(reader: Reader) -> tuple[float, YaRN | None]:
    theta, inner = read_rope(reader, "yarn")
    if inner is None:
        return theta, None
    inner.expect("attention_factor", None)
    inner.expect("truncate", True)
    scales = [float(inner.number(key, 0.0, zero=True)) for key in ("mscale", "mscale_all_dim")]
    if not all(scales):
        if any(scales):
            raise UserError(f"{reader.file}: expected both mscale and mscale_all_dim, or neither")
        scales = [1.0, 0.0]
    return theta, YaRN(
        factor=float(inner.number("factor")),
        beta_fast=float(inner.number("beta_fast", 32)),
        beta_slow=float(inner.number("beta_slow", 1)),
        mscale=scales[0],
        mscale_all_dim=scales[1],
        original_max_seq_len=inner.integer("original_max_position_embeddings"),
    )
