"""From a configuration to a model: its sizes (a `ModelSpec`), then the model with its heads on the
meta device. And back: sizes that were read elsewhere, written into a configuration."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Size

from torchtitan_mtp.config import MTP, JobConfig
from torchtitan_mtp.config.sections.model import ModelArgs as SizeKeys
from torchtitan_mtp.config.setting import options
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.args import ModelArgs, ModelSpec
from torchtitan_mtp.models.flavors import flavors, model_args
from torchtitan_mtp.models.hf import HFTrunk
from torchtitan_mtp.models.hf_config import config_of, read_config, sizes_of_config
from torchtitan_mtp.models.packed import activate_flash_attention
from torchtitan_mtp.models.transformer import build_model
from torchtitan_mtp.models.trunk import Trunk
from torchtitan_mtp.mtp.transform import add_heads, spec_with_heads


def model_args_from_config(
    config: JobConfig, tokenizer_vocab: int, *, min_seq_len: int = 0, earlier: bool = False
) -> ModelArgs:
    """The shape of a run's model before its heads: `model_args` of its configuration.

    `max_seq_len` is the largest of training's, validation's and `min_seq_len`. earlier: with what
    the flavor had before it became TorchTitan's.
    """
    model, training = config.model, config.training
    if model.name == "hf":
        longest = max(min_seq_len, training.seq_len, config.validation.seq_len)
        args = sizes_of_config(read_config(model.hf_assets_path), longest, model.attn_mask_type)
        if (args.vocab_size or 0) < tokenizer_vocab:
            raise UserError(
                f"{model.hf_assets_path}: its tokenizer makes ids up to {tokenizer_vocab - 1}, its "
                f"model has vocab_size = {args.vocab_size}; take the model's own tokenizer"
            )
        return args
    return model_args(
        model.name,
        model.flavor,
        tokenizer_vocab=tokenizer_vocab,
        vocab_size=model.vocab_size,
        max_seq_len=max(min_seq_len, training.seq_len, config.validation.seq_len),
        trained_len=training.seq_len,
        attn_mask_type=model.attn_mask_type,
        changes=model.args.given(),
        earlier=earlier,
    )


def model_from_config(
    config: JobConfig,
    tokenizer_vocab: int,
    dtype: torch.dtype,
    *,
    min_seq_len: int = 0,
    earlier: bool = False,
) -> Trunk:
    """A run's model with its heads, on the meta device; `model.spec` has its sizes. Arguments and
    errors: those of `model_args_from_config`, `HFTrunk` and `spec_with_heads`."""
    args = model_args_from_config(config, tokenizer_vocab, min_seq_len=min_seq_len, earlier=earlier)
    activate_flash_attention(config.model.flash_attn_impl)
    model: Trunk
    if config.model.name == "hf":
        model = HFTrunk(read_config(config.model.hf_assets_path), args, dtype)
        if config.loss.softcap not in (None, model.softcap):
            raise UserError(
                f"loss.softcap = {config.loss.softcap}: the model of {config.model.hf_assets_path} "
                f"has {model.softcap or 'none'}, as config.json says; unset it"
            )
    else:
        model = build_model(args, dtype)
        model.attn_type = config.model.attn_type
        model.softcap = config.loss.softcap
    return add_heads(model, config.mtp) if config.num_future_tokens > 1 else model


def spec_from_config(config: JobConfig, vocab_size: int, earlier: bool = False) -> ModelSpec:
    """The sizes of a run's stored weights, from its configuration and the rows of their embedding;
    `max_seq_len` is what it trained with."""
    args = model_args_from_config(config, 0, earlier=earlier)
    spec = ModelSpec(replace(args, vocab_size=vocab_size, max_seq_len=config.training.seq_len))
    if config.model.name == "hf":
        told = read_config(config.model.hf_assets_path).to_diff_dict()
        spec = ModelSpec(replace(spec.args, vocab_size=args.vocab_size), hf_config=told)
    return spec_with_heads(spec, config.mtp) if config.num_future_tokens > 1 else spec


def write_spec_to_config(config: JobConfig, spec: ModelSpec) -> None:
    """Write a model's sizes into a configuration: as a flavor's name where one fits, else as
    [model.args]."""
    args, model = spec.args, config.model
    if spec.block_type == "deepseek_v3":
        model.name = "deepseek_v3"
    else:
        model.name = "qwen3" if args.qk_norm else "qwen2" if args.qkv_bias else "llama3"
    model.vocab_size = args.vocab_size
    config.training.seq_len = config.validation.seq_len = args.max_seq_len
    wanted = args_to_keys(args)
    same = (name for name, flavor in flavors[model.name].items() if args_to_keys(flavor) == wanted)
    model.flavor = next(same, "custom")
    if model.flavor == "custom":
        keys = options(SizeKeys)
        for key, value in wanted.items():
            keys[key].set(model.args, value)
    if spec.heads:
        model.converters, config.mtp = ["mtp"], _table_of(spec)


def _table_of(spec: ModelSpec) -> MTP:
    """The [mtp] table of the heads of a model that has some."""
    told: dict[str, Any] = vars(spec).copy()  # `add_heads` refuses a family that is not there
    del told["args"], told["hf_config"]
    return MTP(**told)


def args_to_keys(args: ModelArgs) -> dict[str, Any]:
    """A trunk's sizes as keys of [model.args]: all that decides its parameters and what they
    compute, except the vocabulary. (How experts are balanced belongs to the training.)"""
    found: dict[str, Any] = {key.name: getattr(args, key.name) for key in fields(SizeKeys)}
    found |= {"n_kv_heads": args.kv_heads, "head_size": args.head_dim, "hidden_dim": args.ffn_dim}
    if args.latent is not None:
        del found["n_kv_heads"], found["head_size"]
    for name in ("rope_scaling", "latent", "moe"):
        part = found.pop(name)
        told = {} if part is None else vars(part)
        found |= {f"{name}.{key}": v for key, v in told.items() if not key.endswith("_coeff")}
    if args.rope_scaling is not None:
        found["rope_scaling.rope_type"] = args.rope_scaling.rope_type
    return found


def differing_sizes(ours: ModelArgs, theirs: ModelArgs) -> Collection[str]:
    """The sizes, as "name = ours, not theirs", in which two trunks differ."""
    a, b = (args_to_keys(args) | {"vocab_size": args.vocab_size} for args in (ours, theirs))
    return [f"{key} = {a.get(key)}, not {b.get(key)}" for key in a | b if a.get(key) != b.get(key)]


def model_of_spec(spec: ModelSpec) -> Trunk:
    """On the meta device, with its heads. Error: heads of a family that is not there."""
    model: Trunk
    if spec.hf_config is None:
        model = build_model(spec.args)
    else:
        model = HFTrunk(config_of(spec.hf_config), spec.args)
    return add_heads(model, _table_of(spec)) if spec.heads else model


def parameter_shapes(spec: ModelSpec) -> dict[str, Size]:
    """Name -> shape of every parameter and expert's bias; of two tied names, the embedding's alone.
    Errors: those of `model_of_spec`."""
    model = model_of_spec(spec)
    biases = {n: b.shape for n, b in model.named_buffers() if n.endswith(".expert_bias")}
    return {name: param.shape for name, param in model.named_parameters()} | biases


def model_summary(spec: ModelSpec) -> str:
    """One line for people."""
    shapes = parameter_shapes(spec).items()
    count = sum(shape.numel() for name, shape in shapes if not name.endswith("expert_bias"))
    heads = f" and {spec.num_modules} {spec.heads} heads" if spec.heads else ", no further heads"
    return f"{count:,} parameters in {spec.args.n_layers} layers{heads}"
