"""Restore what a full checkpoint holds beside the weights, so that training goes on exactly."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.checkpoint.stateful import Stateful

from torchtitan_mtp.checkpoint import state as states_of
from torchtitan_mtp.checkpoint.load import (
    Opened,
    check_entry,
    excluded,
    names_line,
    names_of,
    read_states,
)
from torchtitan_mtp.checkpoint.state import MOMENTS, OPTIMIZER, RNG, parameter_of, plain_name
from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.config.setting import options
from torchtitan_mtp.data.loader import DataLoader, merge_states
from torchtitan_mtp.distributed.ranks import Ranks
from torchtitan_mtp.errors import UserError

logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Where a run is: steps done, input tokens seen by all ranks, steps whose update was skipped
    for numbers that were not finite; and what it computes with (`settings_of`)."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`, with the present settings; a log line says what differs."""
        self.step, self.tokens = state["step"], state["tokens"]
        self.skipped = state.get("skipped", 0)
        before = state.get("settings", {})  # not in those of earlier versions
        changed = [
            f"{key} {before[key]} -> {value}"
            for key, value in self.settings.items()
            if before.get(key, value) != value
        ]
        if changed:
            logger.info("changed since step %d was saved: %s", self.step, ", ".join(changed))


def settings_of(config: JobConfig) -> dict[str, Any]:
    """The keys that decide what is computed, and not how fast or where, by dotted names."""
    tables = {"model", "loss", "training", "optimizer", "lr_scheduler", "quantize"}
    tables |= {"mtp"} & {*config.model.converters}
    keys = [key for key in options(JobConfig).values() if key.path[0] in tables]
    return {k.name: k.get(config) for k in keys if not (k.is_table or k.rule.path)}


class LoaderState:
    """The loader's position as one state of the whole run."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def state_dict(self) -> dict[str, Any]:
        """Every rank's lanes; all ranks call it together."""
        return merge_states(Ranks().gather(self.loader.state_dict()))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`, on any number of ranks that divides the lanes."""
        self.loader.load_state_dict(state)


def restore(
    opened: Opened,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    extra: Mapping[str, Stateful],
    ranks: Ranks,
    exclude: Sequence[str] = (),
) -> None:
    """Load optimizer, `extra` and random number generators from an open full checkpoint.

    What `exclude` (checkpoint.exclude_from_loading) names starts anew, and so does what belongs to
    it: the moments of its parameters, the schedule of a run that counts from 0. A log line says so.
    The optimizer's hyperparameters stay as they are. Generators are per rank: with another number
    of ranks they start anew, and a log line says so. Error: a state is absent, or the optimizers
    differ.
    """
    without = {*exclude, *(["lr_scheduler"] if "train_state" in exclude else [])}
    extra = {name: item for name, item in extra.items() if name not in without}
    optimizer = None if OPTIMIZER in without else optimizer
    rng = RNG not in without
    if absent := [name for name in extra if name not in opened.stored]:
        raise UserError(
            f"{opened.path}: holds no {', '.join(absent)}: not a full checkpoint of this program; "
            "start from it with checkpoint.initial_load_path in a new folder"
        )
    states: dict[str, Any] = dict.fromkeys(extra)
    fresh = set() if optimizer is None else _fresh(opened, model, exclude)
    moments = dict[str, Any]()
    if optimizer is not None:
        moments = ranks.on_all(lambda: _moments(opened, model, optimizer, fresh))
    if without:
        told = f"; the optimizer's state of {names_line(sorted(fresh))}" if fresh else ""
        logger.info("not loaded, as excluded: %s%s", ", ".join(sorted(without)), told)
    rng_key = f"{RNG}.rank{ranks.rank}"
    if rng and opened.manifest is not None and opened.manifest.world_size == ranks.world_size:
        states[rng_key] = None
    elif rng:
        logger.info("random number generators start anew: saved by another number of ranks")
    states |= moments
    read_states(opened, states, ranks)
    for name, item in extra.items():
        item.load_state_dict(states[name])
    if rng_key in states:
        states_of.set_rng_state(states[rng_key])


def _fresh(opened: Opened, model: nn.Module, exclude: Sequence[str]) -> set[str]:
    """The parameters, here or in the checkpoint, that are not loaded under any name."""
    aliases = names_of(model)
    stored = {parameter_of(key) for key in opened.stored if key.startswith(f"{OPTIMIZER}.")}
    names = {name: aliases.get(name, {name}) for name in aliases.keys() | stored}
    return {name for name, group in names.items() if all(excluded(n, exclude) for n in group)}


def _moments(
    opened: Opened, model: nn.Module, optimizer: torch.optim.Optimizer, fresh: Set[str]
) -> dict[str, Any]:
    """The optimizer's own tensors, to read stored moments into; parameters that are `fresh` or were
    never stepped have none from here on."""
    elsewhere = names_of(model).keys() - states_of.model_state(model).keys()
    stored = {key for key in opened.stored if key.startswith(f"{OPTIMIZER}.")}
    stored = {key for key in stored if parameter_of(key) not in elsewhere}
    current = states_of.empty_optimizer_state(model, optimizer)
    ours, theirs = set(map(parameter_of, current)), set(map(parameter_of, stored))
    found = {k for k in stored if k.startswith(MOMENTS) and parameter_of(k) not in fresh}
    stepped = set(map(parameter_of, found))
    expected = {k for k in current if k.startswith(MOMENTS) and parameter_of(k) in stepped}
    if differing := sorted((ours ^ theirs) - fresh) or sorted(expected ^ found):
        raise UserError(
            f"{opened.path}: only one of its optimizer and the run's has {names_line(differing)}; "
            "resume with the same [mtp] and optimizer.name, or put optimizer into "
            "checkpoint.exclude_from_loading"
        )
    for name, parameter in model.named_parameters():
        if plain_name(name) not in stepped:
            optimizer.state.pop(parameter, None)
    for key in expected:
        if isinstance(current[key], torch.Tensor):
            check_entry(opened, key, current[key], exact_dtype=True)
    return {key: current[key] for key in sorted(expected)}
