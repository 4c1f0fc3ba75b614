"""Threads spin between parallel regions while cores are free, and hardly while they are wanted."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

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


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: threads never spin there")
def test_threads_spin_only_while_cores_are_free() -> None:
    environment = {k: v for k, v in os.environ.items() if k not in shared_cores.USERS_CHOICE}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    free, wanted, free_again, crowded = result.stdout.split()
    assert crowded == "False"
    assert float(wanted) < 0.4 * float(free)
    assert float(wanted) < 0.4 * float(free_again)


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def crowded_while_threads_wait(seconds: float) -> bool:
    with shared_cores.SharedCores() as cores:
        end = time.monotonic() + seconds
        while not cores.crowded and time.monotonic() < end:
            time.sleep(0.01)
        return cores.crowded


@pytest.mark.parametrize("name", shared_cores.USERS_CHOICE)
def test_the_users_own_setting_stays(
    name: str, monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    for choice in shared_cores.USERS_CHOICE:
        monkeypatch.delenv(choice, raising=False)
    monkeypatch.setattr(shared_cores, "_waited", time.monotonic)  # always, for a core
    monkeypatch.setattr(shared_cores, "_INTERVAL", 0.01)
    assert crowded_while_threads_wait(20)
    monkeypatch.setenv(name, "1000")
    assert not crowded_while_threads_wait(0.3)
