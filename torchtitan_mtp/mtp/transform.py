"""The model transform: a next-token model in, a model of n future tokens out."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from torchtitan_mtp.config import MTP, JobConfig
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.args import ModelArgs
from torchtitan_mtp.models.flavors import model_args
from torchtitan_mtp.models.transformer import Transformer, build_model
from torchtitan_mtp.mtp.heads import ParallelHeads, SequentialHeads, last_layer


def args_of_run(
    config: JobConfig, tokenizer_vocab: int, *, at_least: int = 0, earlier: bool = False
) -> ModelArgs:
    """The shape of a run's model: `model_args` of its configuration.

    Positions reach as far as training and validation do, and to `at_least`.
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


def model_of_run(config: JobConfig, args: ModelArgs, dtype: torch.dtype) -> Transformer:
    """A run's model with its heads, on the meta device."""
    model = build_model(args, dtype)
    model.softcap = config.loss.softcap
    return add_heads(model, config.mtp) if "mtp" in config.model.converters else model


def add_heads(model: Transformer, mtp: MTP) -> Transformer:
    """Attach the heads of the `[mtp]` table to a model on the meta device, in place.

    Nothing is attached for n = 1, which is plain next-token training. The trunk's parameter names
    never change. Errors: `match_parameters` with fewer layers than heads.
    """
    n = mtp.num_future_tokens
    if n == 1:
        return model
    if mtp.match_parameters:
        _give_up_layers(model, n - 1)
    weight = model.norm.weight
    with weight.device:
        heads: nn.Module
        if mtp.heads == "sequential":
            heads = SequentialHeads(model, n, mtp.detach_trunk, mtp.share_weights, mtp.trunk_state)
        else:
            heads = ParallelHeads(model, n, mtp.detach_trunk)
    model.mtp = heads.to(weight.dtype)
    if mtp.train != "all":
        for name, param in model.named_parameters():
            param.requires_grad_(name.startswith("mtp.") == (mtp.train == "heads"))
    return model


def _give_up_layers(model: Transformer, count: int) -> None:
    # Gloeckle et al. 2024, section 3: n - 1 layers leave the trunk so that the total stays.
    layers = len(model.layers)
    if count >= layers:
        raise UserError(
            f"mtp.match_parameters: a model of {layers} layers cannot give {count} of them to "
            f"{count + 1} heads; lower mtp.num_future_tokens or take a deeper flavor"
        )
    for i in range(layers - count, layers):
        del model.layers[str(i)]


@torch.no_grad()
def copy_last_layer(model: Transformer, names: Collection[str] | None = None) -> None:
    """Start heads from the trunk's last block, and their output norm from the final norm.

    names: the parameters (and biases of experts) to set, all of the heads' by default. A sequential
    head's projection and input norms have no counterpart in the trunk and keep their own
    initialisation.
    """
    last = last_layer(model).state_dict(keep_vars=True)
    heads = model.mtp.state_dict(prefix="mtp.", keep_vars=True)
    for name, param in heads.items():
        inner = name.split(".", 3)[3].removeprefix("block.")  # mtp.heads.{i}.[block.]inner
        source = model.norm.weight if inner == "norm.weight" else last.get(inner)
        if source is not None and (names is None or name in names):
            param.copy_(source)
