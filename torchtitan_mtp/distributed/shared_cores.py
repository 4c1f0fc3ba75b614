"""OpenMP threads that don't spin on cores which other programs want.

Between two parallel regions GNU's OpenMP, which torch's CPU builds use, lets threads spin for
milliseconds before they sleep. On cores of their own that saves waking them up. On shared cores a
thread spins away the time slice that its partner needs to reach the barrier, and a training step
takes ten times as long as the fair share of the cores would have it.

GOMP_SPINCOUNT is read once, when torch is loaded, and no count is right for both. But libgomp spins
hardly at all while a process has more OpenMP threads than cores (its manual, under GOMP_SPINCOUNT).
So while threads have to wait for a core, one more team of threads is kept, which does nothing else.
Results don't depend on it: the teams that compute stay as they are.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

import torch

_INTERVAL = 0.5  # seconds between looks
_CROWDED, _CALM = 0.25, 0.1  # seconds that threads waited for a core, a second
_CALM_LOOKS = 10  # in a row, before the threads may spin again
USERS_CHOICE = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


class SharedCores:
    """While entered: looks whether this process' threads wait for cores, and acts on it.

    Does nothing where the user has set GOMP_SPINCOUNT or OMP_WAIT_POLICY, where one thread
    computes, and where the system (Linux has it) does not say how long threads waited.
    """

    def __init__(self) -> None:
        self.crowded = False
        self._end = threading.Event()
        self._calm = threading.Event()  # ends the teams that are kept
        self._wanted = (
            torch.get_num_threads() > 1
            and not any(name in os.environ for name in USERS_CHOICE)
            and Path("/proc/self/schedstat").is_file()
        )

    def __enter__(self) -> SharedCores:
        if self._wanted:
            threading.Thread(target=self._run, name="shared-cores", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._calm.set()

    def _run(self) -> None:
        calm, before, then = 0, _waited(), time.monotonic()
        while not self._end.wait(_INTERVAL):
            waited, now = _waited(), time.monotonic()
            share = (waited - before) / (now - then)
            before, then = waited, now
            calm = calm + 1 if share < _CALM else 0
            if share > _CROWDED and not self.crowded:
                self._keep_teams()
            elif calm >= _CALM_LOOKS and self.crowded:
                self.crowded = False
                self._calm.set()

    def _keep_teams(self) -> None:
        """More OpenMP threads than cores, until it is calm."""
        self.crowded, self._calm = True, threading.Event()
        threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
        for _ in range(1 + max(0, cores - threads) // (threads - 1)):
            threading.Thread(target=_keep_team, args=(threads, self._calm), daemon=True).start()


def _keep_team(threads: int, end: threading.Event) -> None:
    torch.zeros(threads << 15).add_(1)  # as many elements as torch gives that many threads
    end.wait()  # the team goes with this thread


def _waited() -> float:
    """Seconds that this process' threads were ready to run and had no core (proc(5), schedstat)."""
    total = 0
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # the thread has ended
            total += int((task / "schedstat").read_text().split()[1])
    return total / 1e9
