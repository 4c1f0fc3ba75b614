"""One run at a time writes into a folder, and a killed one leaves nothing behind that locks it."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack

import pytest

from runs import config_of
from torchtitan_mtp.checkpoint.lock import lock_folders
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.trainer import Trainer

HOLDER = """
import sys, time
from pathlib import Path
from contextlib import ExitStack
from torchtitan_mtp.checkpoint.lock import lock_folders
held = ExitStack()
lock_folders([Path(sys.argv[1])], held)
print("locked", flush=True)
time.sleep(60)
"""


def test_the_holder_is_named_and_its_death_is_enough(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=rf"run: another run .*host .*process {holder.pid}, si"):
            lock_folders([tmp_path / "run"], ExitStack())
        holder.kill()
    with ExitStack() as held:
        lock_folders([tmp_path / "run"], held)


def test_two_runs_in_one_place(tmp_path):
    saves = {"checkpoint.enable": True, "checkpoint.folder": str(tmp_path / "elsewhere")}
    first = Trainer(config_of(tmp_path, saves))
    try:
        with pytest.raises(UserError, match=r"run: another run writes here"):
            Trainer(config_of(tmp_path))
        with pytest.raises(UserError, match=r"elsewhere: another run writes here"):
            Trainer(config_of(tmp_path, saves, {"job.dump_folder": str(tmp_path / "b")}))
    finally:
        first.close()
    with pytest.raises(UserError, match=r"global_batch_size"):
        Trainer(config_of(tmp_path, {"training.global_batch_size": 7}))
    Trainer(config_of(tmp_path)).close()  # one that did not start holds nothing


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"job\.dump_folder = .*file/run: can't be written to"):
        lock_folders([tmp_path / "file" / "run"], ExitStack())
