"""Deaths and full disks in the middle of a save."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "checkpoint"))

from checkpoint_run import Run, equal, snapshot

from torchtitan_mtp.errors import UserError


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("count", [2, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_killed_at_random_moments_of_a_save(count, tmp_path):
    """One and two ranks, in the foreground and in the background: `count` kills each."""
    script = Path(__file__).with_name("killed_ranks.py")
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(count)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = re.search(r"unfinished (\d+) done (\d+)", result.stdout)
    assert found and int(found[1]) + int(found[2]) == 4 * count
    assert int(found[1]) >= count  # most fell into the save


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_disk_that_fills_up_during_a_save(mode, tmp_path):
    """A limit on the size of files stands in for the disk: writes beyond it fail alike."""
    run = Run(tmp_path, async_mode=mode)
    run.train(2)
    run.checkpointer.save(2)
    run.checkpointer.wait()
    saved = snapshot(run)
    run.train(2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "checkpoint" / "step-2" / "__0_0.distcp").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
    try:
        with pytest.raises(UserError, match=r"step-4.*can't be saved: .*File too large") as error:
            run.checkpointer.save(4)
            run.checkpointer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path / "checkpoint") == ["step-2"]
    resumed = Run(tmp_path, seed=1)
    assert resumed.checkpointer.load() == 2
    assert equal(snapshot(resumed), saved)
    assert run.checkpointer.save(4)  # with room again, the same run goes on saving
    run.checkpointer.close()
    assert Run(tmp_path).checkpointer.load() == 4
