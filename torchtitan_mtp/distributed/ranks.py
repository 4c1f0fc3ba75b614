"""All ranks as one: one decides, an error is everyone's, and what each reads is the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch.distributed as dist

from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.config.setting import options
from torchtitan_mtp.errors import UserError

T = TypeVar("T")


class Ranks:
    """All ranks of the job, or one process alone where no process group exists.

    Only small Python objects travel here; tensors never do.

    Args:
        own_group: make a gloo group of our own, so that a background save never shares a
            communicator with training. Without it the default group is used.
        alone: this process alone, also where a process group exists.
    """

    def __init__(self, *, own_group: bool = False, alone: bool = False) -> None:
        self.distributed = dist.is_available() and dist.is_initialized() and not alone
        self.group: dist.ProcessGroup | None = None
        if self.distributed and own_group:
            self.group = dist.new_group(backend="gloo")
        self.rank = dist.get_rank() if self.distributed else 0
        self.world_size = dist.get_world_size() if self.distributed else 1

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        if not self.distributed:
            return [value]
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return cast("list[T]", values)

    def on_rank_0(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 and return its result everywhere.

        Raises:
            UserError: on every rank, when the action fails there.
        """
        result = self.on_all(lambda: action() if self.rank == 0 else None)
        return cast(T, self.gather(result)[0])

    def on_all(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; when it fails on one, fail on all of them.

        Raises:
            UserError: with the message of the first rank that failed.
        """
        result: T | None = None
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:  # whatever it is, the other ranks must not wait for an answer
            failure = error
        told = isinstance(failure, (UserError, OSError))
        what = "" if told else f"{type(failure).__name__}: "
        messages = self.gather(None if failure is None else f"{what}{failure}")
        if failure is not None and not told:
            raise failure  # a fault of the program, with its traceback
        for message in messages:
            if message is not None:
                raise UserError(message) from failure
        return cast(T, result)


def agree(values: Mapping[str, Any]) -> None:
    """See that all ranks have the same values; all call it together, and send but a hash.

    Raises:
        UserError: on every rank: the first key that differs, with each value and its ranks.
    """
    shown = {key: json.dumps(value, default=str) for key, value in values.items()}
    digest = hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()
    if len(set(Ranks().gather(digest))) == 1:
        return
    everyone = Ranks().gather(shown)
    for key in dict.fromkeys(key for rank in everyone for key in rank):
        ranks: dict[str, list[str]] = {}
        for rank, found in enumerate(everyone):
            ranks.setdefault(found.get(key, "nothing"), []).append(str(rank))
        if len(ranks) > 1:
            told = ", ".join(
                f"{value} on rank {', '.join(who[:4])}{', ...' if len(who) > 4 else ''}"
                for value, who in ranks.items()
            )
            raise UserError(f"{key} differs between ranks: {told}; give all of them the same")


def shared_settings(config: JobConfig) -> dict[str, Any]:
    """Keys and values that all ranks have in common. Where a rank finds its input may differ: what
    it finds there is compared."""
    own = {"model.hf_assets_path", "training.dataset_path", "validation.dataset_path"}
    own |= {"training.mixture"}
    own |= {f"job.{key}" for key in ("config_file", "description", "print_config", "debug")}
    keys = options(JobConfig)
    return {k: o.get(config) for k, o in keys.items() if not o.is_table and k not in own}
