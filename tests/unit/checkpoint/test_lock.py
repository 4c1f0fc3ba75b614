"""One run at a time writes into a folder, and a killed one leaves nothing behind that locks it."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack

import pytest

from runs import config_of
from torchtitan_mtp.checkpoint.lock import lock_folders, written_folders
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.trainer import Trainer

HOLDER = """
import sys, time
from pathlib import Path
from contextlib import ExitStack
from torchtitan_mtp.checkpoint.lock import lock_folders
held = ExitStack()
lock_folders({Path(sys.argv[1]): "job.dump_folder"}, held)
print("locked", flush=True)
time.sleep(60)
"""


def test_the_holder_is_named_and_its_death_is_enough(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=rf"run: another run .*host .*process {holder.pid}, si"):
            lock_folders({tmp_path / "run": "job.dump_folder"}, ExitStack())
        holder.kill()
    with ExitStack() as held:
        lock_folders({tmp_path / "run": "job.dump_folder"}, held)


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


@pytest.mark.parametrize("way", ["the folder", "a link", "a link to its run", "inside"])
def test_two_runs_with_one_folder_of_checkpoints(tmp_path, way):
    """However the other run's keys lead there; below it are folders of their own."""
    (tmp_path / "link").symlink_to(tmp_path / "run" / "checkpoint")
    (tmp_path / "linked").symlink_to(tmp_path / "run")
    keys = {
        "the folder": ("b", str(tmp_path / "run" / "checkpoint")),
        "a link": ("b", "../link"),
        "a link to its run": ("b", str(tmp_path / "linked" / "checkpoint")),
        "inside": ("run/inner", "../checkpoint"),
    }[way]
    first = {"checkpoint.enable": True, "job.dump_folder": str(tmp_path / "run")}
    second = {"job.dump_folder": str(tmp_path / keys[0]), "checkpoint.folder": keys[1]}
    configs = [config_of(tmp_path, first), config_of(tmp_path, first, second)]
    for one, other in (configs, configs[::-1]):
        with ExitStack() as held, pytest.raises(UserError) as error:
            lock_folders(written_folders(one), held)
            lock_folders(written_folders(other), held)
        assert "run/checkpoint: another run writes here" in str(error.value)
        assert str(error.value).endswith("choose another checkpoint.folder")
    own = {**second, "checkpoint.folder": "" if way == "inside" else "checkpoint"}
    with ExitStack() as held:
        lock_folders(written_folders(configs[0]), held)
        lock_folders(written_folders(config_of(tmp_path, first, own)), held)


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"job\.dump_folder = .*file/run: can't be written to"):
        lock_folders({tmp_path / "file" / "run": "job.dump_folder"}, ExitStack())
