"""The one way from a configuration to a model: its sizes (a `ModelSpec`), then the model with its
heads on the meta device. And back: how a configuration says sizes that were read elsewhere."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Size

from torchtitan_mtp.config import MTP, JobConfig
from torchtitan_mtp.config.sections.model import ModelArgs as SizeKeys
from torchtitan_mtp.config.setting import options
from torchtitan_mtp.models.args import ModelArgs, ModelSpec
from torchtitan_mtp.models.flavors import flavors, model_args
from torchtitan_mtp.models.transformer import Transformer, build_model
from torchtitan_mtp.mtp.transform import add_heads, with_heads


def args_of_run(
    config: JobConfig, tokenizer_vocab: int, *, at_least: int = 0, earlier: bool = False
) -> ModelArgs:
    """The shape of a run's model before its heads: `model_args` of its configuration.

    Positions reach as far as training and validation do, and to `at_least`. earlier: with what the
    flavor had before it became TorchTitan's.
    """
    model, training = config.model, config.training
    return model_args(
        model.name,
        model.flavor,
        tokenizer_vocab=tokenizer_vocab,
        vocab_size=model.vocab_size,
        max_seq_len=max(at_least, training.seq_len, config.validation.seq_len),
        trained_len=training.seq_len,
        attn_mask_type=model.attn_mask_type,
        changes=model.args.given(),
        earlier=earlier,
    )


def model_of_run(
    config: JobConfig,
    tokenizer_vocab: int,
    dtype: torch.dtype,
    *,
    at_least: int = 0,
    earlier: bool = False,
) -> Transformer:
    """A run's model with its heads, on the meta device; `model.spec` has its sizes. Arguments and
    errors: those of `args_of_run` and `with_heads`."""
    args = args_of_run(config, tokenizer_vocab, at_least=at_least, earlier=earlier)
    model = build_model(args, dtype)
    model.softcap = config.loss.softcap
    return add_heads(model, config.mtp) if config.num_future_tokens > 1 else model


def spec_of_run(config: JobConfig, vocab_size: int, earlier: bool = False) -> ModelSpec:
    """The sizes of a run's stored weights, from its configuration and the rows of their embedding;
    positions reach as far as it trained."""
    args = args_of_run(config, 0, earlier=earlier)
    args = replace(args, vocab_size=vocab_size, max_seq_len=config.training.seq_len)
    return with_heads(args, config.mtp) if config.num_future_tokens > 1 else ModelSpec(args)


def describe_run(config: JobConfig, spec: ModelSpec) -> None:
    """Write a model into a configuration: by its flavor's name where one fits, else by sizes."""
    args, model = spec.args, config.model
    if spec.kind == "deepseek_v3":
        model.name = "deepseek_v3"
    else:
        model.name = "qwen3" if args.qk_norm else "qwen2" if args.qkv_bias else "llama3"
    model.vocab_size = args.vocab_size
    config.training.seq_len = config.validation.seq_len = args.max_seq_len
    wanted = sizes(args)
    same = (name for name, flavor in flavors[model.name].items() if sizes(flavor) == wanted)
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
    del told["args"]
    return MTP(**told)


def sizes(args: ModelArgs) -> dict[str, Any]:
    """What [model.args] can say of a trunk, by its keys: all that decides its parameters and what
    they compute, but for the vocabulary. How experts are balanced is the training's."""
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
    a, b = (sizes(args) | {"vocab_size": args.vocab_size} for args in (ours, theirs))
    return [f"{key} = {a.get(key)}, not {b.get(key)}" for key in a | b if a.get(key) != b.get(key)]


def shapes_of(spec: ModelSpec) -> dict[str, Size]:
    """Name -> shape of every parameter and expert's bias; of two tied names, the embedding's alone.

    Raises:
        UserError: heads of a family that is not there.
    """
    model = build_model(spec.args)
    if spec.heads:
        add_heads(model, _table_of(spec))
    biases = {n: b.shape for n, b in model.named_buffers() if n.endswith(".expert_bias")}
    return {name: param.shape for name, param in model.named_parameters()} | biases


def summary_of(spec: ModelSpec) -> str:
    """One line for people."""
    shapes = shapes_of(spec).items()
    count = sum(shape.numel() for name, shape in shapes if not name.endswith("expert_bias"))
    heads = f" and {spec.modules} {spec.heads} heads" if spec.heads else ", no further heads"
    return f"{count:,} parameters in {spec.args.n_layers} layers{heads}"
