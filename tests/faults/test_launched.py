"""torchrun: a killed rank is started again and goes on, a hung one ends the job by its name."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from runs import config_of
from torchtitan_mtp.config import to_toml

ROOT = Path(__file__).resolve().parents[2]
KEYS = {
    "checkpoint.enable": True,
    "checkpoint.interval": 1,
    "checkpoint.async_mode": "async",
    "training.steps": 100,
    "comm.train_timeout_seconds": 4,
}

PIPELINE = {
    "parallelism.pipeline_parallel_degree": 2,
    "training.global_batch_size": 4,
    "comm.train_timeout_seconds": 15,
}


@pytest.fixture(
    scope="module", params=[{}, pytest.param(PIPELINE, marks=pytest.mark.exhaustive)], ids=str
)
def log(request, tmp_path_factory) -> str:
    """The output of a job whose rank 1 is killed, started again and then stopped, not ended."""
    folder = tmp_path_factory.mktemp("launched")
    (folder / "run.toml").write_text(to_toml(config_of(folder, KEYS, request.param)))
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "integration")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    environment = {k: v for k, v in environment.items() if k not in ("RANK", "WORLD_SIZE")}
    script = str(Path(__file__).with_name("launched.py"))
    launch = "--nproc_per_node 2 --max_restarts 1 --rdzv_backend c10d --rdzv_endpoint localhost:0"
    command = [sys.executable, "-m", "torch.distributed.run", *launch.split(), script]
    process = subprocess.Popen(
        [*command, "--job.config_file", str(folder / "run.toml")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    limit = threading.Timer(200, process.kill)
    limit.start()
    lines, stopped = [], 0
    for line in process.stdout:
        lines.append(line)
        if found := re.search(rf"fault {signal.SIGSTOP.value} in process (\d+)", line):
            stopped = int(found[1])
        if stopped and "[rank 0] error: " in line:
            time.sleep(2)  # rank 0 is gone first, and its error the first that torchrun sees
            os.kill(stopped, signal.SIGKILL)  # as torchrun does after 30 seconds
            stopped = 0
    limit.cancel()
    return "".join([*lines, f"exit status {process.wait()}"])


def test_a_killed_rank_is_started_again_and_goes_on(log):
    assert f"fault {signal.SIGKILL.value} in process" in log
    # Step 3 may have been under way on the rank that lived.
    assert re.search(r"resumed .*step-3 at step 3", log), log


def test_a_hung_rank_ends_the_job_and_is_named(log):
    assert log.endswith("exit status 1")
    said = re.search(r"\[rank 0\] error: (step 6.*)\n", log)
    assert said, log
    assert "rank 1 gives no sign of life, last seen in " in said[1]
    assert re.search("Timed out waiting (4|15)000ms", said[1])
    root = log[log.index("Root Cause (first observed failure)") :]
    assert re.search(r"rank +: 0 ", root)
    assert said[1] in root  # torchrun's summary names rank 1 as well
