"""Stopping when told to: a signal to any rank ends the run on all of them after the same step."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from typing import Any

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# torchrun passes on a Ctrl-C that the terminal has sent to its workers too, and Slurm signals tasks
# and the script that passes it on: within this many seconds, two signals under them are one.
_ECHO = 2.0
_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID")
_PARENT = os.getppid()
_PATIENCE = 30.0  # seconds that torchrun gives its ranks after a SIGTERM


class Stopping:
    """While entered, the first signal asks for a stop; a second one ends the process at once.

    Ranks agree without waiting for one another: `ask` starts a reduction of four bytes over a gloo
    group of its own, and `agreed` takes its result after the step that ran meanwhile. So a stop
    comes at most one step later than with a barrier, and no device waits for the host.

    A thread reads the signals from a pipe that the interpreter fills, since a Python handler would
    not run while the main thread is inside a collective or a kernel.

    Attributes:
        signal: what all ranks agreed to stop for; None while they go on.
        noticed: number of the first signal that this rank got; 0 before.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.noticed = 0
        self._group: dist.ProcessGroup | None = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._work: dist.Work | None = None
        self._left = threading.Event()

    # ---- agreeing ----

    def ask(self) -> None:
        """Start to ask the other ranks whether one of them was told to stop; all ranks call it."""
        if self._work is not None:
            self.agreed()
        if self.signal is None and self._group is not None:
            self._flag.fill_(self.noticed)
            self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, self._group, async_op=True)

    def agreed(self) -> bool:
        """Whether to stop now, by the answers to the last `ask`; the same on all ranks."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        elif self._group is None:
            self._flag.fill_(self.noticed)  # alone, there is nobody to wait for
        if self.signal is None and (number := int(self._flag)):
            self.signal = signal.Signals(number)
        return self.signal is not None

    # ---- noticing ----

    def __enter__(self) -> Stopping:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return self  # signals are the main thread's
        read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in SIGNALS:
            self._before[number] = signal.signal(number, lambda *_: None)
        threading.Thread(target=self._watch, args=(read_end,), name="signals", daemon=True).start()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            threading.Thread(target=self._watch_launcher, name="launcher", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(self._write_end)  # ends the thread
            self._before = {}

    def _watch_launcher(self) -> None:
        """What torchrun does to its ranks when it ends they do themselves where it was killed."""
        while os.getppid() == _PARENT:
            if self._left.wait(1.0):
                return
        logger.error("torchrun (process %d), which started this rank, is gone", _PARENT)
        os.kill(os.getpid(), signal.SIGTERM)
        if not self._left.wait(_PATIENCE):
            os._exit(128 + signal.SIGTERM)

    def _watch(self, read_end: int) -> None:
        since = 0.0
        try:
            while received := os.read(read_end, 1):
                number = received[0]
                if number not in SIGNALS:
                    continue
                if not self.noticed:
                    self.noticed, since = number, time.monotonic()
                    logger.warning(
                        "%s: stopping after this step; another signal ends the run at once",
                        signal.Signals(number).name,
                    )
                elif time.monotonic() - since > _ECHO or not os.environ.keys() & set(_LAUNCHERS):
                    os._exit(128 + number)
        except Exception:  # nobody would hear a signal any more: better an early end that is saved
            self.noticed = self.noticed or signal.SIGTERM
            logger.exception("signals can't be read any more: stopping after this step")
        finally:
            os.close(read_end)
