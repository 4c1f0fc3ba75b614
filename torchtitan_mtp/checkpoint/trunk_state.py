"""Which state of the trunk a model's modules read: what no tensor of a checkpoint tells."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from torchtitan_mtp.checkpoint.folders import find_config
from torchtitan_mtp.config import TrunkState, load_toml
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.mtp.heads import SequentialHeads


def trunk_state_of(model: nn.Module) -> TrunkState:
    """`mtp.trunk_state` of a model; without sequential heads "normalized"."""
    heads = getattr(model, "mtp", None)
    return heads.trunk_state if isinstance(heads, SequentialHeads) else "normalized"


def check_trunk_state(source: Path, theirs: TrunkState, model: nn.Module) -> None:
    """Refuse a source whose modules were trained on another state of the trunk."""
    if isinstance(getattr(model, "mtp", None), SequentialHeads) and theirs != trunk_state_of(model):
        raise UserError(
            f"{source}: its modules read the trunk's {theirs} state, the run's the "
            f'{trunk_state_of(model)} one; set mtp.trunk_state = "{theirs}", or leave them out '
            'with checkpoint.exclude_from_loading = ["mtp"]'
        )


def check_native_trunk_state(checkpoint: Path, model: nn.Module) -> None:
    """The same for a checkpoint of our own, by the config.toml of its run; without one (a seed
    checkpoint on its own, TorchTitan's) nothing is known."""
    try:
        config = load_toml(find_config(checkpoint))
    except UserError:
        return
    mtp = config.mtp
    if "mtp" in config.model.converters and mtp.num_future_tokens > 1 and mtp.heads == "sequential":
        check_trunk_state(checkpoint, mtp.trunk_state, model)
