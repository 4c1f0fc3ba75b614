"""All ranks as one: one decides, and an error is everyone's."""

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
        message: str | None = None
        try:
            result = action()
        except (UserError, OSError) as error:
            failure, message = error, str(error)
        except Exception as error:  # whatever it is, the other ranks must not wait for an answer
            failure, message = error, f"{type(error).__name__}: {error}"
        messages = [told for told in self.gather(message) if told is not None]
        if failure is not None and not isinstance(failure, (UserError, OSError)):
            raise failure  # a fault of the program, with its traceback
        if messages:
            raise UserError(messages[0]) from failure
        return cast(T, result)
