"""Threads spin between parallel regions while cores are free, and hardly while they are wanted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchtitan_mtp.distributed import shared_cores

ROOT = Path(__file__).parents[3]

# CPU seconds while the main thread sleeps after a parallel region: what its partner spins away.
PROGRAM = """
import time, torch
from torchtitan_mtp.distributed import shared_cores

rate = 0  # seconds that threads wait for a core, a second
shared_cores._waited = lambda: rate * time.monotonic()
shared_cores._INTERVAL, shared_cores._CALM_LOOKS = 0.05, 2

def spun():
    x, total = torch.ones(1 << 18), 0.0
    for _ in range(40):
        x.add_(1)
        start = time.process_time()
        time.sleep(0.002)
        total += time.process_time() - start
    return total

def look(crowded):
    global rate
    rate, end = int(crowded), time.monotonic() + 20
    while cores.crowded != crowded and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.3)  # teams come and go

with shared_cores.SharedCores() as cores:
    free = spun()
    look(crowded=True)
    wanted = spun()
    look(crowded=False)
    print(free, wanted, spun(), cores.crowded)
"""


def run_program(**variables: str) -> list[str]:
    own = shared_cores.USERS_CHOICE
    environment = {k: v for k, v in os.environ.items() if k not in own}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"} | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: threads never spin there")
def test_threads_spin_only_while_cores_are_free() -> None:
    free, wanted, free_again, crowded = run_program()
    assert crowded == "False"
    assert float(wanted) < 0.4 * float(free)
    assert float(wanted) < 0.4 * float(free_again)


def test_the_users_own_setting_stays() -> None:
    *_, crowded = run_program(GOMP_SPINCOUNT="1000")
    assert crowded == "False"
