"""scripts/multinode.slurm with Slurm's commands and Python as stubs."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUBS = {
    # Two tasks; when $STUB_WAITS, they leave when they are told to.
    "srun": """
echo "srun $1" >>"$LOG"; shift
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 "$@"
done
for _ in {1..200}; do
    [[ -z ${STUB_WAITS:-} || -e $LOG.told ]] && exit "$STUB_STATUS"
    sleep 0.05
done
exit 9""",
    "scancel": 'echo "scancel $*" >>"$LOG"; touch "$LOG.told"',
    "scontrol": """
echo "scontrol $*" >>"$LOG"
[[ $1 == requeue ]] || printf 'node-a\\nnode-b\\n'""",
}
PYTHON = """#!/usr/bin/env bash
echo "rank $RANK of $WORLD_SIZE, local $LOCAL_RANK, at $MASTER_ADDR:$MASTER_PORT: $*" >>"$LOG"
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The script beside a set-up that is done, with stubs in PATH."""
    root = tmp_path / "checkout"
    (root / "scripts").mkdir(parents=True)
    (root / "scripts" / "setup.sh").write_text(f"PYTHON={root}/python\n")
    (root / "python").write_text(PYTHON)
    for name, text in STUBS.items():
        (root / name).write_text("#!/usr/bin/env bash\n" + text)
    for file in root.iterdir():
        file.chmod(0o755)
    # Slurm runs a copy from its own folder.
    copy = tmp_path / "spool" / "slurm_script"
    copy.parent.mkdir()
    copy.write_bytes((ROOT / "scripts" / "multinode.slurm").read_bytes())
    return root


def start(root: Path, **variables: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PATH": f"{root}:{os.environ['PATH']}",
        "LOG": str(root / "log"),
        "SLURM_SUBMIT_DIR": str(root),
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "STUB_STATUS": "0",
        **variables,
    }
    script = root.parent / "spool" / "slurm_script"
    return subprocess.Popen(
        ["bash", str(script), "--job.config_file", "my run.toml"],
        cwd=root.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def log(root: Path) -> list[str]:
    return (root / "log").read_text().splitlines() if (root / "log").exists() else []


@pytest.mark.parametrize("status", ["0", "1"])
def test_one_trainer_a_task_and_its_status(checkout, status):
    process = start(checkout, STUB_STATUS=status)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == int(status), errors
    at = "at node-a:23456: -m torchtitan_mtp.train --job.config_file my run.toml"
    assert log(checkout)[1:] == [
        "srun --kill-on-bad-exit=1",
        f"rank 0 of 2, local 0, {at}",
        f"rank 1 of 2, local 1, {at}",
    ]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("status", ["0", "138"])
def test_told_to_stop_it_passes_that_on_and_goes_back_into_the_queue(checkout, number, status):
    process = start(checkout, STUB_WAITS="1", STUB_STATUS=status)
    while len(log(checkout)) < 4:
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == int(status)
    after = ["scancel --signal=USR1 123456"]
    if status == "0":  # where nothing was saved, going on would begin anew
        after.append("scontrol requeue 123456")
    assert log(checkout)[4:] == after
