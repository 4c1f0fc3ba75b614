"""Kill a save before each of its file operations and after random times; check what is left.

Run as `python killed_saves.py FOLDER`; prints how many different moments it killed at. The
checkpoints before the killed save (steps 2 and 4) and, where it got that far, the killed one
(step 6) must load and equal what was saved; the next save must work.
"""

import itertools
import os
import random
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import torch
from checkpoint_run import Run, equal, snapshot

OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}


def run_to(folder: Path, step: int, seed: int = 0) -> Run:
    run = Run(folder, keep_latest_k=2, seed=seed)
    run.train(step, seed=0)
    return run


def in_child(action, *arguments) -> int:
    """Run `action` in a fork; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        action(*arguments)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def save_and_die(folder: Path, moment: int) -> None:
    """Save step 6; die before the `moment`-th file operation in the checkpoint's folder."""
    run = run_to(folder, 6)
    left = moment

    def count(event: str, arguments: tuple) -> None:
        nonlocal left
        if event in OPERATIONS and str(folder) in str(arguments[0]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    run.checkpointer.save(6)


def save_for(folder: Path, seconds: float) -> None:
    """Save step 6, killed after `seconds`."""
    run = run_to(folder, 6)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    run.checkpointer.save(6)


def check(folder: Path) -> None:
    """What is left resumes exactly, and a new save of step 6 (or 8) works."""
    run = Run(folder, keep_latest_k=2, seed=7)
    step = run.checkpointer.load()
    assert step in (4, 6), step
    assert equal(snapshot(run), snapshot(run_to(folder, step))), step
    run.train(6 - step or 2)
    following = 6 if step == 4 else 8
    assert run.checkpointer.save(following)
    assert Run(folder).checkpointer.load() == following
    whole = {f"step-{step}" for step in (following - 2, following)}
    assert {entry.name for entry in run.checkpointer.folder.iterdir()} == whole


def main() -> None:
    torch.set_num_threads(1)  # forking
    base = Path(sys.argv[1])
    good = base / "good"
    for step in (2, 4):  # here, so that the forks need not import what this does
        run_to(good, step).checkpointer.save(step)
    Run(good).checkpointer.load()
    kills, rng = 0, random.Random(0)
    for moment in itertools.count(1):
        folder = base / f"killed-{moment}"
        shutil.copytree(good, folder)
        status = in_child(save_and_die, folder, moment)
        assert in_child(check, folder) == 0, f"after a kill at operation {moment}"
        shutil.rmtree(folder)
        if status == 0:
            break  # it got to its end
        assert status == -signal.SIGKILL, status
        kills += 1
    for number in range(3):
        folder = base / f"timed-{number}"
        shutil.copytree(good, folder)
        seconds = rng.uniform(0.001, 0.1)
        status = in_child(save_for, folder, seconds)
        assert status in (0, -signal.SIGALRM), status
        assert in_child(check, folder) == 0, f"after a kill at {seconds} s"
    print(kills)


if __name__ == "__main__":
    main()
