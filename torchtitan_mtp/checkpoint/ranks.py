"""The ranks that save and load together: one decides, and an error is everyone's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist

from torchtitan_mtp.errors import UserError

T = TypeVar("T")


class Ranks:
    """All ranks of the job, or one process alone where no process group exists.

    Only small Python objects travel here; tensors never do.

    Args:
        own_group: make a gloo group of our own, so that a background save never shares a
            communicator with training. Without it the default group is used.
    """

    def __init__(self, *, own_group: bool = False) -> None:
        self.distributed = dist.is_available() and dist.is_initialized()
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

    def first(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 and return its result everywhere.

        Raises:
            UserError: on every rank, when the action fails with a UserError or an OSError.
        """
        outcome: list[tuple[T | None, str | None]] = [(None, None)]
        if self.rank == 0:
            try:
                outcome = [(action(), None)]
            except (UserError, OSError) as error:
                outcome = [(None, str(error))]
        if self.distributed:
            dist.broadcast_object_list(outcome, src=0, group=self.group)
        result, message = outcome[0]
        if message is not None:
            raise UserError(message)
        return cast(T, result)

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; when it fails on one, fail on all of them.

        Raises:
            UserError: with the message of the first rank that failed.
        """
        result: T | None = None
        message: str | None = None
        try:
            result = action()
        except (UserError, OSError) as error:
            message = str(error)
        for rank, failure in enumerate(self.gather(message)):
            if failure is not None:
                raise UserError(failure if rank == 0 else f"{failure} (rank {rank})")
        return cast(T, result)
