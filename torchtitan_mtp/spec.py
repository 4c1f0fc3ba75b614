"""What a format has to know of a model: its shape, its heads, and how our config.toml says it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Size

from torchtitan_mtp.config import MTP, JobConfig, TrunkState
from torchtitan_mtp.models.args import ModelArgs
from torchtitan_mtp.models.flavors import flavors
from torchtitan_mtp.models.transformer import build_model
from torchtitan_mtp.mtp import add_heads, args_of_run

# What [model.args] can say; the rest of `ModelArgs` is the run's.
_SIZES: tuple[str, ...] = ("dim", "n_layers", "n_heads", "norm_eps", "rope_theta")
_SIZES += ("tied_embeddings", "qk_norm", "qkv_bias")


@dataclass(frozen=True)
class ModelSpec:
    """A trunk and its heads.

    args: `n_layers` counts the blocks that are there, `max_seq_len` the tokens the model may see.
    heads: "parallel", "sequential", or "" for none; then `num_future_tokens` is 1.
    trunk_state: what the first sequential head reads (`mtp.trunk_state`).
    """

    args: ModelArgs
    heads: str = ""
    num_future_tokens: int = 1
    share_weights: bool = False
    trunk_state: TrunkState = "normalized"

    @property
    def modules(self) -> int:
        """How many blocks stand beside or behind the trunk."""
        further = self.num_future_tokens - 1
        return min(further, 1) if self.share_weights else further

    @property
    def kind(self) -> str:
        """What its blocks are: "llama" (heads of keys and values, dense), "deepseek_v3" (latent
        attention, mixtures of experts), or "" for another combination."""
        return {(True, True): "deepseek_v3", (False, False): "llama"}.get(
            (self.args.latent is not None, self.args.moe is not None), ""
        )

    def without_heads(self) -> ModelSpec:
        """The trunk alone."""
        return ModelSpec(self.args)

    def summary(self) -> str:
        """One line for people."""
        shapes = self.shapes().items()
        count = sum(shape.numel() for name, shape in shapes if not name.endswith("expert_bias"))
        heads = f" and {self.modules} {self.heads} heads" if self.heads else ", no further heads"
        return f"{count:,} parameters in {self.args.n_layers} layers{heads}"

    def shapes(self) -> dict[str, Size]:
        """Name -> shape of every parameter and expert's bias; of two tied names, the embedding's
        alone."""
        model = build_model(self.args)
        mtp = MTP(num_future_tokens=self.num_future_tokens, share_weights=self.share_weights)
        mtp.heads = "sequential" if self.heads == "sequential" else "parallel"
        add_heads(model, mtp)
        biases = {n: b.shape for n, b in model.named_buffers() if n.endswith(".expert_bias")}
        return {name: param.shape for name, param in model.named_parameters()} | biases


def spec_of_run(config: JobConfig, vocab_size: int, earlier: bool = False) -> ModelSpec:
    """The model of a run, from its configuration and the rows of its embedding. earlier: with what
    its flavor had before it became TorchTitan's."""
    args = args_of_run(config, 0, earlier=earlier)
    args = replace(args, vocab_size=vocab_size, max_seq_len=config.training.seq_len)
    mtp = config.mtp
    if "mtp" not in config.model.converters or mtp.num_future_tokens == 1:
        return ModelSpec(args)
    if mtp.match_parameters:
        args = replace(args, n_layers=args.n_layers - (mtp.num_future_tokens - 1))
    return ModelSpec(args, mtp.heads, mtp.num_future_tokens, mtp.share_weights, mtp.trunk_state)


def describe_run(config: JobConfig, spec: ModelSpec) -> None:
    """Write a model into a configuration: by its flavor's name where one fits, else by sizes."""
    args, model = spec.args, config.model
    if spec.kind == "deepseek_v3":
        model.name = "deepseek_v3"
    else:
        model.name = "qwen3" if args.qk_norm else "qwen2" if args.qkv_bias else "llama3"
    model.vocab_size = args.vocab_size
    config.training.seq_len = config.validation.seq_len = args.max_seq_len
    wanted = _sizes(args)
    same = (name for name, flavor in flavors[model.name].items() if _sizes(flavor) == wanted)
    model.flavor = next(same, "custom")
    if model.flavor == "custom":
        for key in _SIZES:
            setattr(model.args, key, wanted[key])
        model.args.hidden_dim = args.ffn_dim
        if args.latent is None:
            model.args.n_kv_heads, model.args.head_size = args.kv_heads, args.head_dim
        if args.rope_scaling is not None:
            model.args.rope_scaling.rope_type = args.rope_scaling.rope_type
        for name in ("rope_scaling", "latent", "moe"):
            for key, value in _part(args, name).items():
                setattr(getattr(model.args, name), key, value)
    if spec.heads:
        model.converters = ["mtp"]
        config.mtp.heads = "sequential" if spec.heads == "sequential" else "parallel"
        config.mtp.num_future_tokens = spec.num_future_tokens
        config.mtp.share_weights = spec.share_weights
        config.mtp.trunk_state = spec.trunk_state


def _sizes(args: ModelArgs) -> dict[str, Any]:
    """All that decides a trunk's parameters and what they compute, but for the vocabulary."""
    sizes = {key: getattr(args, key) for key in _SIZES}
    derived: dict[str, Any] = {"ffn": args.ffn_dim}
    if args.latent is None:
        derived |= {"kv": args.kv_heads, "head": args.head_dim}
    for name in ("latent", "moe"):
        derived |= {f"{name}.{key}": v for key, v in _part(args, name).items()}
    return sizes | derived | {"rope_scaling": args.rope_scaling}


def _part(args: ModelArgs, name: str) -> dict[str, Any]:
    part = getattr(args, name)
    return {} if part is None else function_fields(vars(part))


def function_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a part of a shape computes with: all but how experts are balanced, the training's."""
    return {key: value for key, value in values.items() if not key.endswith("_coeff")}


def differing_sizes(ours: ModelArgs, theirs: ModelArgs) -> Collection[str]:
    """The sizes, as "name = ours, not theirs", in which two trunks differ."""
    a, b = _sizes(ours), _sizes(theirs)
    a["vocab_size"], b["vocab_size"] = ours.vocab_size, theirs.vocab_size
    return [f"{key} = {a.get(key)}, not {b.get(key)}" for key in a | b if a.get(key) != b.get(key)]
