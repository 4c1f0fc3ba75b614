"""A run that is told to stop saves once, ends, and goes on as if it had never stopped."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from runs import config_of, same, train, write_corpus
from torchtitan_mtp.config import to_toml
from torchtitan_mtp.distributed.stopping import Stopping
from torchtitan_mtp.train import main
from torchtitan_mtp.trainer import Trainer

SAVES = {
    "checkpoint.enable": True,
    "checkpoint.interval": 4,
    "checkpoint.last_save_model_only": False,
}


def tell(trainer: Trainer, number: int) -> None:
    """Send this process the signal, and wait until the run has noticed."""
    os.kill(os.getpid(), number)
    deadline = time.monotonic() + 20
    while not trainer.stopping.noticed and time.monotonic() < deadline:
        time.sleep(0.001)
    assert trainer.stopping.noticed == number


def interrupt(trainer: Trainer, where: str, number: int) -> None:
    """Be told to stop inside step 3, in the validation after it, or in the save of step 4."""
    step, write, forward = trainer.pieces.engine, trainer.checkpointer._write, trainer.model.forward
    told = False

    def once(*, now: bool) -> None:
        nonlocal told
        if now and not told:
            told = True
            tell(trainer, number)

    def engine(*args):
        once(now=where == "step" and trainer.state.step == 2)
        return step(*args)

    def forward_and_stop(*args, **options):
        once(now=where == "validation" and not torch.is_grad_enabled())
        return forward(*args, **options)

    def write_and_stop(*args):
        once(now=where == "save" and args[1] == 4)
        return write(*args)

    trainer.pieces.engine, trainer.checkpointer._write = engine, write_and_stop
    trainer.model.forward = forward_and_stop


def saved_steps(folder: Path) -> list[str]:
    return sorted(entry.name for entry in (folder / "run" / "checkpoint").glob("step-*"))


# where -> the step after which the run ends, and what it has saved by then
PLACES = {
    "step": (3, ["step-3"]),
    "validation": (3, ["step-3"]),
    "save": (5, ["step-4", "step-5"]),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data"), "jsonl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    return train(config_of(tmp_path_factory.mktemp("whole"), data))


def validation(data: dict) -> dict:
    return {
        "validation.enable": True,
        "validation.dataset": "held_out",
        "validation.dataset_path": data["training.dataset_path"],
        "validation.freq": 3,
    }


@pytest.mark.parametrize(
    ("where", "number", "mode"),
    [
        ("step", signal.SIGTERM, "disabled"),
        ("validation", signal.SIGINT, "async"),
        ("save", signal.SIGUSR1, "disabled"),
        ("save", signal.SIGTERM, "async"),
    ],
)
def test_told_to_stop_anywhere(where, number, mode, tmp_path, data, whole):
    keys = {**SAVES, **validation(data), "checkpoint.async_mode": mode}
    written = []

    def prepare(trainer: Trainer) -> None:
        interrupt(trainer, where, number)
        write = trainer.checkpointer._write

        def note(states, step, *rest):
            written.append(step)
            return write(states, step, *rest)

        trainer.checkpointer._write = note

    before = signal.getsignal(number)
    first = train(config_of(tmp_path, data, keys), prepare)
    assert signal.getsignal(number) is before
    end, saved = PLACES[where]
    assert first.logged[-1]["step"] == end
    assert saved_steps(tmp_path) == saved
    assert written == [int(name.removeprefix("step-")) for name in saved]  # each of them once
    second = train(config_of(tmp_path, data, keys))
    assert second.start == end
    assert first.losses + second.losses == whole.losses
    assert same(second.weights, whole.weights)


@pytest.mark.parametrize(
    ("saves", "status", "said"),
    [
        (True, 0, "SIGTERM: stopped after step 3 of 6, saved: the same command goes on from here"),
        (
            "load_step",
            0,
            "step 3 of 6, saved: the same command without checkpoint.load_step goes on from here",
        ),
        (False, 143, "stopped after step 3 of 6, nothing saved: checkpoint.enable = false"),
    ],
)
def test_the_exit_status_says_whether_it_was_saved(
    saves, status, said, tmp_path, data, monkeypatch, capsys
):
    config = config_of(tmp_path, data, SAVES, {"checkpoint.enable": bool(saves)})
    if saves == "load_step":  # where a step-3 lies, of the run that it goes back in
        train(config_of(tmp_path, data, SAVES, {"checkpoint.interval": 1}))
        config.checkpoint.load_step = 2
    (tmp_path / "run.toml").write_text(to_toml(config))
    step = Trainer.train_step

    def told_in_step_3(self: Trainer) -> None:
        if self.state.step == 2:
            tell(self, signal.SIGTERM)
        step(self)

    monkeypatch.setattr(Trainer, "train_step", told_in_step_3)
    assert main(["--job.config_file", str(tmp_path / "run.toml")]) == status
    assert said in capsys.readouterr().err
    if saves == "load_step":
        monkeypatch.undo()
        assert train(config_of(tmp_path, data, SAVES)).start == 3


def test_interrupted_before_the_first_step_is_one_line(tmp_path, data, monkeypatch, capsys):
    (tmp_path / "run.toml").write_text(to_toml(config_of(tmp_path, data)))

    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr(Trainer, "_build", interrupted)
    assert main(["--job.config_file", str(tmp_path / "run.toml")]) == 130
    assert capsys.readouterr().err.endswith(
        "error: interrupted before the first step; nothing was trained\n"
    )


def in_child(action) -> int:
    """The exit status of a fork that runs `action`."""
    child = os.fork()
    if child == 0:
        action()
        os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_second_signal_ends_the_process_at_once(number):
    def action() -> None:
        stopping = Stopping()
        with stopping:
            os.kill(os.getpid(), number)
            while not stopping.noticed:
                time.sleep(0.001)
            os.kill(os.getpid(), number)
            threading.Event().wait(20)

    start = time.monotonic()
    assert in_child(action) == 128 + number
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("launcher", ["TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"])
def test_under_a_launcher_an_echo_is_no_second_signal(launcher, monkeypatch):
    """The terminal's Ctrl-C reaches workers twice: by itself, and passed on by torchrun."""
    monkeypatch.setenv(launcher, "x")

    def action() -> None:
        stopping = Stopping()
        with stopping:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.2)
            os._exit(3 if stopping.agreed() else 4)

    assert in_child(action) == 3
