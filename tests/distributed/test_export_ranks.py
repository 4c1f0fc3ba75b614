"""What two ranks saved, exported by one process; what was exported, started from by two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from formats_run import weights
from runs import SEQUENTIAL, Run, config_of, same, train, weights_of
from spawn import run_ranks
from torchtitan_mtp.checkpoint.formats import export_checkpoint, import_checkpoint
from torchtitan_mtp.config import load_toml
from torchtitan_mtp.trainer import Trainer

RUN: dict[str, Any] = {
    **SEQUENTIAL,
    "training.steps": 2,
    "checkpoint.enable": True,
    "checkpoint.last_save_in_hf": True,
}


def train_and_start_again(rank: int, folder: Path) -> tuple[Run, dict[str, torch.Tensor]]:
    first = train(config_of(folder, RUN | here(folder)))
    torch.distributed.barrier()  # rank 0 has exported
    again = config_of(
        folder,
        RUN | here(folder),
        {
            "job.dump_folder": str(folder / "again"),
            "checkpoint.initial_load_in_hf": True,
            "checkpoint.initial_load_path": str(folder / "run/checkpoint/step-2.hf"),
        },
    )
    started: list[dict[str, torch.Tensor]] = []

    def look(trainer: Trainer) -> None:
        started.append(weights_of(trainer))

    train(again, look)
    return first, started[0]


def here(folder: Path) -> dict[str, Any]:
    """Both ranks read and write one folder."""
    return {"job.dump_folder": str(folder / "run")}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("export")
    config_of(folder)  # writes the corpus
    return folder, run_ranks(2, train_and_start_again, folder)


def test_one_process_exports_what_two_ranks_saved(two_ranks, tmp_path: Path) -> None:
    folder, results = two_ranks
    config_of(tmp_path)  # this process knows the flavor, too
    step = folder / "run" / "checkpoint" / "step-2"
    assert len(list(step.glob("__1_*.distcp"))) == 1
    export_checkpoint(step, tmp_path / "hf", "glm4_moe_hf", max_shard_size=20_000)
    import_checkpoint(tmp_path / "hf", tmp_path / "back", "glm4_moe_hf")
    found = weights(tmp_path / "back", load_toml(tmp_path / "back" / "config.toml"))
    assert same(found, results[0][0].weights)


def test_the_last_step_is_a_hugging_face_folder(two_ranks, tmp_path: Path) -> None:
    folder, _ = two_ranks
    config_of(tmp_path)
    export_checkpoint(folder / "run", tmp_path / "hf", "glm4_moe_hf")
    saved = folder / "run" / "checkpoint" / "step-2.hf"
    assert same(
        load_file(saved / "model.safetensors"), load_file(tmp_path / "hf/model.safetensors")
    )
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names < {file.name for file in saved.iterdir()}


def test_two_ranks_start_from_it(two_ranks) -> None:
    _, results = two_ranks
    for first, started in results:
        assert same(started, first.weights)
