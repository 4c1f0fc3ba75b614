"""What a full checkpoint holds of a run beside its model, optimizer and schedule."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from torchtitan_mtp.data.loader import DataLoader, merge_states


@dataclass
class TrainState:
    """Where a run is: steps done, input tokens seen by all ranks, steps whose update was skipped
    for numbers that were not finite."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.step, self.tokens = state["step"], state["tokens"]
        self.skipped = state.get("skipped", 0)


class LoaderState:
    """The loader's position as one state of the whole run."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def state_dict(self) -> dict[str, Any]:
        """Every rank's lanes; all ranks call it together."""
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, self.loader.state_dict())
        return merge_states(states)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`, on any number of ranks that divides the lanes."""
        self.loader.load_state_dict(state)
