"""Trainings inside the test process: one thread, and nothing of one test is left for the next."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from runs import a_world
from torchtitan_mtp.train import main


@pytest.fixture(autouse=True)
def own_world() -> Iterator[None]:
    with a_world():
        yield


@pytest.fixture(scope="session", params=["parallel", "sequential"])
def trained_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has learned to write ASCII; not to be changed."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    options = {
        "job.dump_folder": str(folder),
        "model.flavor": "quickstart",
        "model.args.n_layers": "2",
        "model.converters": "mtp",
        "mtp.heads": request.param,
        "mtp.num_future_tokens": "3",
        "training.seq_len": "32",
        "training.local_batch_size": "2",
        "training.seed": "0",
        "training.steps": "30",
        "training.mixed_precision_param": "float32",
        "optimizer.lr": "1e-2",
        "lr_scheduler.warmup_steps": "2",
        "checkpoint.enable": "true",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    with a_world():
        assert main(arguments) == 0
    return folder
