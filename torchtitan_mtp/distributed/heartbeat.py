"""Which rank is missing, when the others wait for it in vain."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import threading
import time
from typing import Any

import torch.distributed as dist

from torchtitan_mtp.errors import UserError

logger = logging.getLogger(__name__)

_INTERVAL = 1.0  # seconds; the store serves some ten thousand keys a second
_RANKS_A_SECOND = 2000
_SILENCE = 3  # beats that are missing before a rank counts as silent


class Heartbeat:
    """Every rank leaves a sign of life, and where it is, in the job's store.

    While entered, an error of a collective (a peer that died, or hung beyond the group's timeout)
    becomes a `UserError` that names the ranks that are missing.

    Args:
        timeout: seconds without a collective's answer after which it fails, for the message.

    Attributes:
        where: what this rank is doing ("step 7"), for the others to read.
    """

    def __init__(self, timeout: int) -> None:
        self.timeout = timeout
        self.where = "start"
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._interval = max(_INTERVAL, self._world / _RANKS_A_SECOND)
        self._end = threading.Event()
        self._beats = 0

    def __enter__(self) -> Heartbeat:
        if self._world > 1:
            # A connection of its own: a wait on the job's would hold up the beats.
            store: Any = dist.distributed_c10d._get_default_store()
            self._store = dist.PrefixStore("heartbeat", store.clone())
            for run in (self._beat, self._watch):
                threading.Thread(target=run, name="heartbeat", daemon=True).start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if self._world > 1 and error is not None and lost_contact(error):
                reason = re.sub(r"^\[.*?\] ", "", str(error).splitlines()[0]).split(". ")[0]
                missing = f"no answer of another rank for {self.timeout} s, all are in {self.where}"
                try:
                    missing = self._missing() or missing
                except RuntimeError:
                    missing = "rank 0, which keeps the job's store, does not answer"
                raise LostContact(f"{self.where}: {missing} ({reason})") from error
        finally:
            self._end.set()

    def _beat(self) -> None:
        try:
            while not self._end.is_set():
                self._beats += 1
                place = f"{socket.gethostname()} (process {os.getpid()})"
                self._store.set(str(self._rank), f"{self._beats}\n{self.where}\n{place}")
                self._end.wait(self._interval)
        except RuntimeError:
            pass  # the store went with the rank that holds it; the main thread will notice
        except Exception:
            logger.exception("the heartbeat has ended: the other ranks will take this one for dead")

    def _watch(self) -> None:
        """Say who is missing shortly before NCCL's watchdog ends a process that waits in vain: it
        does so without a word in Python."""
        where, since, told = "", 0.0, False
        while not self._end.wait(self._interval):
            if self.where != where:
                where, since, told = self.where, time.monotonic(), False
            elif not told and time.monotonic() - since > 0.7 * self.timeout:
                told = True
                with contextlib.suppress(RuntimeError):  # as in `_beat`
                    missing = self._missing()
                    if missing and self.where == where:
                        logger.error("%s for %d s: %s", where, time.monotonic() - since, missing)

    def _missing(self) -> str:
        """The ranks that gave no sign of life lately, or else are elsewhere; "" if there are none.

        A rank that ends because of another one goes on beating until it knows; so who is silent
        now is the cause. It takes a few seconds: a launcher that sees the dead rank ends this one
        before, which leaves the cause as the first failure in its log.
        """
        before = self._read()
        time.sleep(_SILENCE * self._interval)
        now = self._read()
        silent = [rank for rank in before if before[rank][0] == now[rank][0]]
        if silent:
            return "; ".join(
                f"rank {rank} gives no sign of life, last seen in {now[rank][1]} on {now[rank][2]}"
                for rank in silent
            )
        elsewhere = [rank for rank in now if now[rank][1] != self.where]
        return "; ".join(f"rank {rank} is in {now[rank][1]}" for rank in elsewhere)

    def _read(self) -> dict[int, list[str]]:
        """rank -> beats, where, place; of the others that have ever beaten."""
        ranks = [rank for rank in range(self._world) if rank != self._rank]
        known = [rank for rank in ranks if self._store.check([str(rank)])]
        values = self._store.multi_get([str(rank) for rank in known]) if known else []
        return {r: v.decode().split("\n") for r, v in zip(known, values, strict=True)}


class LostContact(UserError):
    """Another rank is the cause: what this one has is of no use any more."""


def lost_contact(error: BaseException | None) -> bool:
    """Whether a collective failed, here or below an exception that wraps it."""
    if error is None:
        return False
    # gloo raises plain RuntimeErrors that begin with its source file.
    of_gloo = isinstance(error, RuntimeError) and "/gloo/" in str(error)
    failed = of_gloo or isinstance(error, dist.DistError)
    return failed or lost_contact(error.__cause__ or error.__context__)
