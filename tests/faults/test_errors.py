"""What else ends a run: one line each, from the real entry point."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from runs import config_of, write_corpus
from torchtitan_mtp.config import to_toml
from torchtitan_mtp.train import main
from torchtitan_mtp.trainer import Trainer

SAVES = {"checkpoint.enable": True, "checkpoint.interval": 1}


@pytest.fixture
def fails(tmp_path, capsys):
    """Run with these keys; the one line that it fails with."""

    def run(keys) -> str:
        (tmp_path / "run.toml").write_text(to_toml(config_of(tmp_path, keys)))
        assert main(["--job.config_file", str(tmp_path / "run.toml")]) == 1
        output = capsys.readouterr()
        errors = [line for line in output.err.splitlines() if "error: " in line]
        assert len(errors) == 1 and output.err.endswith(errors[0] + "\n"), output.err
        assert "Traceback" not in output.err
        return errors[0]

    return run


def before_step(monkeypatch, number: int, action) -> None:
    step = Trainer.train_step

    def act_then_step(self: Trainer) -> None:
        if self.state.step + 1 == number:
            action()
        step(self)

    monkeypatch.setattr(Trainer, "train_step", act_then_step)


@pytest.mark.parametrize("kind", ["jsonl", "text", "parquet"])
def test_a_data_file_that_is_cut_short_under_the_run(kind, fails, tmp_path, monkeypatch):
    data = write_corpus(tmp_path / "data", kind)
    place = Path(data["training.dataset_path"])
    files = sorted(place.iterdir()) if place.is_dir() else [place]

    def cut() -> None:
        for file in files:
            os.truncate(file, file.stat().st_size // 3)

    before_step(monkeypatch, 3, cut)
    line = fails({**data, **SAVES, "training.steps": 60})
    assert "bytes when the run began" in line and str(place) in line
    assert (tmp_path / "run" / "checkpoint" / "step-2").is_dir()


def test_out_of_memory_says_what_to_lower(fails, monkeypatch):
    def fail(*_) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")

    monkeypatch.setattr("torchtitan_mtp.trainer.clip_gradients", fail)
    line = fails({})
    assert "step 1: out of memory (CUDA out of memory. Tried to allocate 9 GiB); lower " in line
    assert "training.local_batch_size" in line


def allocate_on_the_cpu() -> None:
    torch.empty(1 << 50)


def allocate_for_numpy() -> None:
    np.empty(1 << 50)


def fill_python() -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("fail", "found"),
    [
        (allocate_on_the_cpu, "can't allocate memory: you tried to allocate 4503599627370496 "),
        (allocate_for_numpy, "Unable to allocate 8.00 PiB for an array"),
        (fill_python, "out of memory; lower"),
    ],
)
@pytest.mark.parametrize("table", ["training", "validation"])
def test_out_of_a_machines_memory(fail, found, table, fails, monkeypatch):
    """Torch, NumPy and Python say it in ways of their own."""
    keys = {"validation.enable": True, "validation.freq": 1}
    part = {"training": "clip_gradients", "validation": "evaluate_batches"}[table]
    monkeypatch.setattr(f"torchtitan_mtp.trainer.{part}", lambda *_: fail())
    line = fails(keys)
    where = "step 1" if table == "training" else "validation after step 1"
    assert f"error: {where}" in line and found in line
    assert f"lower {table}.local_batch_size" in line


def test_a_failed_background_save_does_not_hide_what_ended_the_run(fails, monkeypatch):
    from torch.distributed.checkpoint import FileSystemWriter

    def no_space(*_):
        raise OSError(28, "No space left on device")

    def fail() -> None:
        raise torch.OutOfMemoryError("the cause.")

    monkeypatch.setattr(FileSystemWriter, "write_data", no_space)
    before_step(monkeypatch, 2, fail)
    assert "the cause" in fails({**SAVES, "checkpoint.async_mode": "async"})


def test_torchrun_is_told_the_line(fails, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    line = fails({"model.flavor": "9B"})
    record = json.loads((tmp_path / "error.json").read_text())["message"]
    assert f"error: {record['message']}" == line
    assert int(record["extraInfo"]["timestamp"]) > 1e9


def test_nobody_to_meet(fails, monkeypatch):
    meet = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    meet |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in meet.items():
        monkeypatch.setenv(name, value)
    line = fails({"comm.init_timeout_seconds": 1})
    assert line.startswith("[rank 1] error: can't meet the other ranks at localhost:1: ")


class Payload:
    """Unpickled without care, it writes the canary file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return (Path.write_text, (self.canary, "ran"))


@pytest.mark.parametrize("value", ["dict", "tensor"])
def test_a_malicious_pth_does_not_run(value, tmp_path):
    from torchtitan_mtp.errors import UserError
    from torchtitan_mtp.formats import import_checkpoint

    canary, source = tmp_path / "canary", tmp_path / "source"
    source.mkdir()
    (source / "params.json").write_text(
        json.dumps({"dim": 32, "n_layers": 1, "n_heads": 4, "vocab_size": 320, "norm_eps": 1e-5})
    )
    state = {"tok_embeddings.weight": torch.zeros(320, 32), "x": Payload(canary)}
    torch.save(state if value == "dict" else Payload(canary), source / "consolidated.00.pth")
    with pytest.raises(UserError, match=r"consolidated.00.pth: can't be read as plain tensors"):
        import_checkpoint(source, tmp_path / "out", "meta")
    assert not canary.exists() and not (tmp_path / "out").exists()
    torch.load(source / "consolidated.00.pth", weights_only=False)
    assert canary.exists()  # the payload does work
