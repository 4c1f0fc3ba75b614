"""What tests of two ranks share: whole trainings beside those of one process, and counts of what
the ranks exchange in a step."""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from runs import Run, config_of, train, validation
from torchtitan_mtp.config import MTP
from torchtitan_mtp.trainer import Trainer

Keys = Mapping[str, Any]
EAGER = {"compile.enable": False}
SAVES = {"checkpoint.enable": True, "checkpoint.last_save_model_only": False}
# Of a training that saves and is validated halfway, and goes on from there.
HALFWAY = {"training.steps": 4, "checkpoint.interval": 2, "validation.enable": True, **SAVES}


@dataclass
class Trainings:
    """Keys of trainings by name, and those that ranks and one process have beside them. The first
    has those of `HALFWAY`."""

    runs: Mapping[str, Keys]
    of_ranks: Keys
    of_one: Keys = field(default_factory=dict)

    def run(
        self, folder: Path, name: str, at: str, prepare: Callable[[Trainer], object] | None = None
    ) -> Run:
        """A training in folder/"name at", from what is there to its end. at: of one process, which
        is not compiled, "alone" or "back"; of ranks, another name."""
        own = {**self.of_one, **EAGER} if at in ("alone", "back") else self.of_ranks
        held_out = {**validation(folder, 2), "validation.enable": False}
        where = {"job.dump_folder": str(folder / f"{name} {at}")}
        return train(config_of(folder, held_out, self.runs[name], own, where), prepare)

    def alone(self, folder: Path) -> Run:
        """The first, in one process; it leaves what the ranks go on from."""
        name = next(iter(self.runs))
        run = self.run(folder, name, "alone")
        take_over(folder, f"{name} alone", f"{name} resumed")
        return run

    def on_ranks(
        self, folder: Path, prepare: Mapping[str, Callable[[Trainer], object]] | None = None
    ) -> dict[str, Run]:
        """All, on every rank, and "resumed", the first from what one process saved."""
        watched = prepare or {}
        runs = {name: self.run(folder, name, "ranks", watched.get(name)) for name in self.runs}
        return {**runs, "resumed": self.run(folder, next(iter(runs)), "resumed")}

    def assert_go_on(self, folder: Path, alone: Run, ranks: Run, resumed: Run) -> None:
        """The first, both ways: `resumed` on ranks; and in one process from what ranks saved."""
        assert resumed.start == 2
        assert_close(resumed.losses, alone.losses[2:])
        name = next(iter(self.runs))
        take_over(folder, f"{name} ranks", f"{name} back")
        back = self.run(folder, name, "back")
        assert back.start == 2
        assert_close(back.losses, ranks.losses[2:])


def take_over(folder: Path, saved: str, to: str) -> None:
    """What one training had halfway, for another to go on from."""
    shutil.copytree(folder / saved / "checkpoint/step-2", folder / to / "checkpoint/step-2")


def train_on_rank(rank: int, folder: Path, *keys: Keys) -> Run:
    return train(config_of(folder, *keys))


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def assert_trained_alike(found: list[Run], expected: Run) -> None:
    """What ranks logged is the same on all, and what one process did."""
    first = found[0]
    assert all(run.losses == first.losses for run in found)
    assert_close(first.losses, expected.losses)
    for key in ("grad_norm", "head_accuracies"):
        assert_close([step[key] for step in first.logged], [step[key] for step in expected.logged])
    for key in ("n_tokens_seen", "extra_metrics", "head_scales"):
        assert [step[key] for step in first.logged] == [step[key] for step in expected.logged]
    assert_close(first.validated, expected.validated)
    for ours, single in zip(first.acceptance, expected.acceptance, strict=True):
        assert ours.drafted == single.drafted and min(ours.drafted) > 100
        torch.testing.assert_close(ours.agreed, single.agreed, rtol=0, atol=2)  # ties


STEPS = {  # ([mtp], activation checkpointing) by name
    "plain": (MTP(num_future_tokens=1), "none"),
    "parallel 2": (MTP(num_future_tokens=2), "none"),
    "parallel 6": (MTP(num_future_tokens=6), "none"),
    "parallel 6, joint": (MTP(num_future_tokens=6, engine="joint"), "none"),
    "chain 6": (MTP(num_future_tokens=6, heads="sequential"), "none"),
    "medusa 6": (MTP(num_future_tokens=6, heads="medusa"), "none"),
    "plain, checkpointed": (MTP(num_future_tokens=1), "full"),
}


def blocks(name: str, layers: int) -> tuple[int, int]:
    """In one of `STEPS` of a model with so many layers: its blocks, those of heads with them, and
    how many of them are computed anew in the backward."""
    own = 0 if name == "medusa 6" else STEPS[name][0].num_future_tokens - 1
    again = {"plain, checkpointed": layers, "chain 6": own, "parallel 6, joint": own}
    return layers + own, again.get(name, 0)


@contextlib.contextmanager
def counted(
    module: ModuleType, *functions: str, what: Callable[..., str] | None = None
) -> Iterator[Counter[str]]:
    """How often a module's functions are called meanwhile; what: makes the name to count under of
    a call's arguments, else it is the function's."""
    counts: Counter[str] = Counter()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **options: Any) -> Any:
            counts[what(*args) if what is not None else name] += 1
            return function(*args, **options)

        return count

    with contextlib.ExitStack() as patches:
        for name in functions:
            function = counting(name, getattr(module, name))
            patches.enter_context(mock.patch.object(module, name, function))
        yield counts
