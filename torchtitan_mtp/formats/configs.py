"""config.json and params.json, both ways: the model's shape as other programs write it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats.names import GLM_EXPERTS
from torchtitan_mtp.models.args import ModelArgs, ModelSpec, RoPEScaling, YaRN

# ---- Hugging Face ----


def write_shape(
    args: ModelArgs, architecture: str, model_type: str, **older: Any
) -> dict[str, Any]:
    """What all families' configs name alike. older: what earlier readers of a rotary scaling look
    for beside its type."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": args.rope_theta}
    if (scaling := args.rope_scaling) is not None:
        values = asdict(scaling)
        values["original_max_position_embeddings"] = values.pop("original_max_seq_len")
        rope |= {"rope_type": scaling.rope_type, **older, **values}
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "intermediate_size": args.ffn_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": args.max_seq_len,
        "initializer_range": 0.02,
        "rms_norm_eps": args.norm_eps,
        "tie_word_embeddings": args.tied_embeddings,
        "attention_bias": args.qkv_bias,
        "attention_dropout": 0.0,
        "use_cache": True,
        "rope_theta": args.rope_theta,  # for readers older than rope_parameters
        "rope_parameters": rope,
    }
    return config if scaling is None else config | {"rope_scaling": rope}


def dense_config(architecture: str, model_type: str, spec: ModelSpec) -> dict[str, Any]:
    """LlamaConfig, Qwen2Config, Qwen3Config, or MiMo's: Qwen2's and the number of modules.

    Raises:
        UserError: YaRN; for Qwen2 heads of another width than dim / n_heads, which engines ignore.
    """
    args = spec.args
    if isinstance(args.rope_scaling, YaRN):
        raise UserError("YaRN is written for DeepSeek's models only")
    if model_type == "qwen2" and args.head_dim * args.n_heads != args.dim:
        raise UserError(
            f"model.args.head_size = {args.head_dim}, and Qwen2's heads are {args.dim} / "
            f"{args.n_heads} wide"
        )
    config = write_shape(args, architecture, model_type) | {"head_dim": args.head_dim}
    config |= {"num_nextn_predict_layers": spec.num_modules} if spec.num_modules else {}
    if model_type == "llama":
        return config | {"mlp_bias": False}
    if model_type.startswith("qwen"):
        config |= {"use_sliding_window": False, "sliding_window": None}
        config["max_window_layers"] = args.n_layers
    return config


def glm4_moe_config(spec: ModelSpec) -> dict[str, Any]:
    """Glm4MoeConfig of a dense model (see `names.glm4_moe_hf`)."""
    config = dense_config("Glm4MoeForCausalLM", "glm4_moe", spec)
    config["rope_parameters"]["partial_rotary_factor"] = 1.0
    return config | {
        "partial_rotary_factor": 1.0,
        "use_qk_norm": spec.args.qk_norm,
        "first_k_dense_replace": spec.args.n_layers - 1,
        "moe_intermediate_size": spec.args.ffn_dim,
        "n_shared_experts": 1,
        "n_routed_experts": GLM_EXPERTS,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": spec.num_modules,
    }


def mellum_config(spec: ModelSpec) -> dict[str, Any]:
    """MellumConfig of a dense model with full attention everywhere."""
    config = dense_config("MellumForCausalLM", "mellum", spec)
    layers, modules = spec.args.n_layers, spec.num_modules
    rope = config.pop("rope_parameters")
    config.pop("rope_scaling", None)
    return config | {
        "rope_parameters": {"full_attention": rope, "sliding_attention": rope},
        "layer_types": ["full_attention"] * layers,
        "mlp_layer_types": ["dense"] * layers,
        "num_nextn_predict_layers": modules,
        "mtp_layer_types": ["full_attention"] * modules,
        "mtp_mlp_layer_types": ["dense"] * modules,
        "moe_intermediate_size": spec.args.ffn_dim,
        "num_experts": 2,
        "num_experts_per_tok": 1,
    }


# Of each model type transformers' own class, and others that are written with it.
_CLASSES = {
    "llama": ("LlamaForCausalLM",),
    "mistral": ("MistralForCausalLM",),
    "qwen2": ("Qwen2ForCausalLM", "MiMoForCausalLM"),
    "qwen3": ("Qwen3ForCausalLM",),
    "glm4_moe": ("Glm4MoeForCausalLM",),
    "mellum": ("MellumForCausalLM",),
    "deepseek_v3": ("DeepseekV3ForCausalLM",),
}
_MOST = 2000  # beyond any model's; the names of millions of layers would fill the memory


class Unsupported(UserError):
    """A model that is not built here, though transformers may have it."""


class Reader:
    """Values of a config file, each missing or unfit one refused by name."""

    def __init__(self, file: Path, values: Mapping[str, Any]) -> None:
        self.file, self.values = file, values

    def number(self, key: str, default: Any = None, zero: bool = False) -> Any:
        """`zero`: it may be that as well."""
        value = self.values.get(key)
        value = default if value is None else value
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not fits or not (0 < value <= sys.float_info.max or (zero and value == 0)):
            least = "of at least" if zero else "above"
            raise self.unfit(key, value, f"a finite number {least} 0")
        return value

    def integer(self, key: str, default: int | None = None, zero: bool = False) -> int:
        value = self.number(key, default, zero)
        if int(value) != value or value >= 2**31:
            raise self.unfit(key, value, "an integer below 2^31")
        return int(value)

    def count(self, key: str, default: int | None = None, zero: bool = False) -> int:
        """Of what has tensors of its own: layers, modules, experts."""
        if (value := self.integer(key, default, zero)) > _MOST:
            raise self.unfit(key, value, f"at most {_MOST}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        if not isinstance(value, bool | None):
            raise self.unfit(key, value, "true or false")
        return default if value is None else value

    def mapping(self, *keys: str) -> Mapping[str, Any]:
        """The first of these objects that is there and not empty."""
        key = next((key for key in keys if self.values.get(key)), keys[0])
        value = self.values.get(key) or {}
        if not isinstance(value, dict):
            raise self.unfit(key, value, "an object")
        return value

    def architectures(self) -> list[str]:
        """By the model type where none is said. Error: the two are of different models."""
        kind = self.values.get("model_type")
        known = _CLASSES.get(str(kind), ())
        value = self.values.get("architectures") or [*known[:1]]
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.unfit("architectures", value, "a list of names")
        if known and not {*known} & {*value}:
            found = f"architectures = {value}, but model_type = {kind!r} is {known[0]}'s"
            raise UserError(f"{self.file}: {found}; set the one that is meant in both")
        return value

    def unfit(self, key: str, value: Any, expected: str) -> UserError:
        return UserError(f"{self.file}: {key} = {value!r}, expected {expected}")

    def expect(self, key: str, *allowed: Any) -> None:
        """The value is one of `allowed` (the first where it is absent)."""
        if (value := self.values.get(key, allowed[0])) not in allowed:
            only = " and ".join(repr(other) for other in allowed if other is not None)
            raise Unsupported(f"{self.file}: {key} = {value!r} is not supported here, only {only}")


_ROPE = "rope_scaling", "rope_parameters"  # the first that there is counts, to transformers


def read_rope(reader: Reader, scaled: str, nested: str = "") -> tuple[float, Reader | None]:
    """Base, and the scaling of the kind `scaled` if there is any, as transformers takes them."""
    values, trained = reader.mapping(*_ROPE), "original_max_position_embeddings"
    if nested in values:
        values = Reader(reader.file, values).mapping(nested)
    elif trained in reader.values:
        values = {**values, trained: reader.values[trained]}
    older = {"rope_theta": reader.values.get("rope_theta"), "rope_type": values.get("type")}
    inner = Reader(reader.file, {**older, **values})
    inner.expect("rope_type", "default", scaled, None)
    theta = float(inner.number("rope_theta", 10000.0))
    return theta, inner if inner.values["rope_type"] == scaled else None


def read_shape(reader: Reader, longest: int) -> dict[str, Any]:
    """Fields of `ModelArgs` that all families' configs name alike. longest: where none is said."""
    return {
        "dim": reader.integer("hidden_size"),
        "n_layers": reader.count("num_hidden_layers"),
        "n_heads": reader.integer("num_attention_heads"),
        "vocab_size": reader.integer("vocab_size"),
        "hidden_dim": reader.integer("intermediate_size"),
        "max_seq_len": reader.integer("max_position_embeddings", longest),
        "tied_embeddings": reader.flag("tie_word_embeddings"),
    }


# What transformers takes where a config does not say it.
_MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 2**17, "sliding_window": 4096}
_DEFAULTS = {"MistralForCausalLM": _MISTRAL, "Qwen3ForCausalLM": {"head_dim": 128}}


def read_dense(
    reader: Reader, *, qk_norm: bool = False, qkv_bias: bool = False, rope: str = ""
) -> ModelArgs:
    """The trunk of a config of Llama's family. rope: where in rope_parameters it is."""
    for name in reader.architectures():
        reader = Reader(reader.file, {**_DEFAULTS.get(name, {}), **reader.values})
    for key in ("mlp_bias", "use_sliding_window", *(() if qkv_bias else ("attention_bias",))):
        reader.expect(key, False, None)  # Qwen2 has biases, whatever the last says
    reader.expect("hidden_act", "silu")
    window = reader.values.get("sliding_window")
    if "MistralForCausalLM" in reader.architectures() and window is not None:
        raise Unsupported(
            f"{reader.file}: sliding_window = {window!r} is not supported here; null is the same "
            "model where no text is longer than the window: set it for such texts"
        )
    shape = read_shape(reader, longest=2048)
    heads, dim = shape["n_heads"], shape["dim"]
    head_dim = reader.integer("head_dim", dim // heads)
    theta, scaled = read_rope(reader, "llama3", rope)
    scaling = None
    if scaled is not None:
        keys = ("factor", "low_freq_factor", "high_freq_factor")
        length = scaled.integer("original_max_position_embeddings")
        factors = {key: float(scaled.number(key)) for key in keys}
        scaling = RoPEScaling(**factors, original_max_seq_len=length)
    return ModelArgs(
        **shape,
        n_kv_heads=reader.integer("num_key_value_heads", heads),
        head_size=None if head_dim * heads == dim else head_dim,
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
        norm_eps=float(reader.number("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
    )


def read_glm4_moe(reader: Reader) -> ModelArgs:
    """The trunk of a Glm4MoeConfig that `glm4_moe_config` wrote; real mixtures are refused."""
    if (experts := reader.values.get("n_routed_experts")) != GLM_EXPERTS:
        raise Unsupported(
            f"{reader.file}: n_routed_experts = {experts!r}: GLM's mixtures of experts are not "
            f"supported here, only dense models written as glm4_moe_hf, with {GLM_EXPERTS}"
        )
    args = read_dense(
        reader, qk_norm=reader.flag("use_qk_norm"), qkv_bias=reader.flag("attention_bias")
    )
    reader.expect("first_k_dense_replace", args.n_layers - 1)
    reader.expect("moe_intermediate_size", args.ffn_dim)
    reader.expect("n_shared_experts", 1)
    key = "partial_rotary_factor"
    rope = {key: reader.values.get(key), **reader.mapping(*_ROPE)}
    Reader(reader.file, rope).expect(key, 1.0)
    return args


def read_mellum(reader: Reader) -> ModelArgs:
    """The trunk of a MellumConfig that is dense and looks at everything."""
    args = read_dense(reader, qk_norm=True, rope="full_attention")
    reader.expect("num_nextn_predict_layers", 1, 0, None)
    for prefix, count in (("", args.n_layers), ("mtp_", read_modules(reader))):
        for key, only in (("layer_types", "full_attention"), ("mlp_layer_types", "dense")):
            if count:
                reader.expect(prefix + key, [only] * count)
    return args


def read_modules(reader: Reader) -> int:
    """How many MTP modules, or Meta's further heads, there are."""
    metas = reader.count("n_future_tokens", 1) - 1
    older = reader.count("num_mtp_layers", metas, zero=True)
    return reader.count("num_nextn_predict_layers", older, zero=True)


# ---- vLLM's speculators ----


def medusa_config(spec: ModelSpec) -> dict[str, Any]:
    """MedusaConfig of vLLM's: heads of one layer each, one unembedding for all.

    Raises:
        UserError: a model without such heads.
    """
    if not spec.heads:
        raise UserError('holds heads of mtp.heads = "medusa" alone, and this model has none')
    return {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": spec.args.dim,
        "vocab_size": spec.args.vocab_size,
        "num_heads": spec.num_modules,
        "num_hidden_layers": 1,
        "medusa_fc_bias": False,
        "original_lm_head": True,
    }


def read_medusa(reader: Reader) -> NoReturn:
    """Refuses it: there is no trunk to run."""
    raise UserError(
        f"{reader.file}: MedusaModel holds heads alone, expected a whole model; import the folder "
        "of the model that they draft for, or take the checkpoint that they came from"
    )


# ---- Meta ----


def meta_params(spec: ModelSpec) -> dict[str, Any]:
    """params.json; `n_layers` counts the trunk's blocks and the further heads'.

    Raises:
        UserError: a shape that Meta's model has not.
    """
    args = spec.args
    if args.head_dim * args.n_heads != args.dim or args.rope_scaling is not None:
        raise UserError("its model has no head_size and no rotary scaling")
    params: dict[str, Any] = {
        "dim": args.dim,
        "n_layers": args.n_layers + spec.num_modules,
        "n_heads": args.n_heads,
        "vocab_size": args.vocab_size,
        "multiple_of": args.ffn_dim,  # what its rule gives is rounded up to a multiple of the width
        "ffn_dim_multiplier": args.ffn_dim / int(2 * 4 * args.dim / 3),
        "norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "n_future_tokens": spec.num_future_tokens,
    }
    return params | ({} if args.n_kv_heads is None else {"n_kv_heads": args.n_kv_heads})


def read_meta(reader: Reader) -> ModelArgs:
    """The trunk of a params.json."""
    n = reader.count("n_future_tokens", 1)
    multiplier = reader.values.get("ffn_dim_multiplier")
    heads = reader.integer("n_heads")
    args = ModelArgs(
        dim=reader.integer("dim"),
        n_layers=reader.count("n_layers") - (n - 1),
        n_heads=heads,
        n_kv_heads=reader.integer("n_kv_heads", heads),
        vocab_size=reader.integer("vocab_size"),
        multiple_of=reader.integer("multiple_of", 256),
        ffn_dim_multiplier=None if multiplier is None else reader.number("ffn_dim_multiplier"),
        norm_eps=float(reader.number("norm_eps", 1e-5)),
        rope_theta=float(reader.number("rope_theta", 10000.0)),
        max_seq_len=reader.integer("max_seq_len", 4096),
    )
    if args.n_layers < 1:
        found, least = args.n_layers + n - 1, f"at least n_future_tokens = {n}"
        raise reader.unfit("n_layers", found, least)
    return args
