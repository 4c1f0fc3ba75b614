"""The model transform: a next-token model in, a model of n future tokens out."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import torch

from torchtitan_mtp.config import MTP
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.args import ModelSpec
from torchtitan_mtp.models.heads import Heads, TrunkParts
from torchtitan_mtp.models.trunk import Trunk
from torchtitan_mtp.mtp.medusa import MedusaHeads
from torchtitan_mtp.mtp.parallel import ParallelHeads
from torchtitan_mtp.mtp.sequential import SequentialHeads

FAMILIES: dict[str, Callable[[TrunkParts, MTP], Heads]] = {  # by `mtp.heads` and `ModelSpec.heads`
    "parallel": ParallelHeads,
    "sequential": SequentialHeads,
    "medusa": MedusaHeads,
}


def spec_with_heads(spec: ModelSpec, mtp: MTP) -> ModelSpec:
    """The sizes of a model without heads once it has those of the `[mtp]` table.

    Raises:
        UserError: no such family; `match_parameters` with fewer layers than heads.
    """
    n, args = mtp.num_future_tokens, spec.args
    if n == 1:
        return spec
    if mtp.heads not in FAMILIES:
        raise UserError(f'mtp.heads = "{mtp.heads}": expected one of {", ".join(FAMILIES)}')
    if mtp.match_parameters and spec.hf_config is not None:
        raise UserError('mtp.match_parameters = true: model.name = "hf" keeps its layers; unset it')
    if mtp.match_parameters:
        # Gloeckle et al. 2024, section 3: n - 1 layers leave the trunk so that the total stays.
        if n > args.n_layers:
            raise UserError(
                f"mtp.match_parameters: a model of {args.n_layers} layers cannot give {n - 1} of "
                f"them to {n} heads; lower mtp.num_future_tokens or take a deeper flavor"
            )
        args = replace(args, n_layers=args.n_layers - (n - 1))
    return replace(
        spec,
        args=args,
        heads=mtp.heads,
        num_future_tokens=n,
        share_weights=mtp.share_weights,
        trunk_state=mtp.trunk_state,
    )


def add_heads(model: Trunk, mtp: MTP) -> Trunk:
    """Attach the heads of the `[mtp]` table to a model on the meta device, in place.

    Nothing is attached for n = 1, which is plain next-token training. The trunk's parameter names
    never change. Errors: those of `spec_with_heads`.
    """
    layers, model.spec = model.args.n_layers, spec_with_heads(model.spec, mtp)
    if not model.spec.heads:
        return model
    for i in range(model.args.n_layers, layers):
        del model.layers[str(i)]
    weight = model.output.weight
    with weight.device:
        heads = FAMILIES[mtp.heads](model.parts(), mtp)
    model.mtp = heads.to(weight.dtype)
    if mtp.train != "all":
        for name, param in model.named_parameters():
            param.requires_grad_(name.startswith("mtp.") == (mtp.train == "heads"))
    return model


@torch.no_grad()
def copy_last_layer(model: Trunk, names: Collection[str] | None = None) -> None:
    """Start heads from the trunk's last block, and their output norm from the final norm.

    A sequential head's projection and input norms have no counterpart in the trunk and keep their
    own initialisation.

    Args:
        names: the parameters (and biases of experts) to set, all of the heads' by default.
    """
    assert model.mtp is not None
    last = model.mtp.trunk_parts.head_layer.state_dict(keep_vars=True)
    final = model.norm.state_dict(keep_vars=True)
    heads = model.mtp.state_dict(prefix="mtp.", keep_vars=True)
    for name, param in heads.items():
        inner = name.split(".", 3)[3].removeprefix("block.")  # mtp.heads.{i}.[block.]inner
        source = last.get(inner, final.get(inner.removeprefix("norm.")))
        if source is not None and (names is None or name in names):
            param.copy_(source)
