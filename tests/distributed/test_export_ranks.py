"""What four ranks saved, exported by one process; what was exported, started from by two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from formats_run import weights
from runs import SEQUENTIAL, Run, config_of, same, train, weights_of
from spawn import run_ranks
from torchtitan_mtp.config import load_toml
from torchtitan_mtp.data.targets import Batch
from torchtitan_mtp.formats import export_checkpoint, import_checkpoint
from torchtitan_mtp.trainer import Trainer

RUN: dict[str, Any] = {
    **SEQUENTIAL,
    "training.steps": 2,
    "checkpoint.enable": True,
    "checkpoint.last_save_in_hf": True,
}


def train_on(rank: int, folder: Path) -> Run:
    return train(config_of(folder, RUN | here(folder)))


class FirstStep(NamedTuple):
    """What a rank started with: all weights, its batch, and the loss that was logged for all."""

    weights: dict[str, Tensor]
    batch: Batch
    loss: float  # of head 1


def start_from(rank: int, folder: Path, exported: Path) -> FirstStep:
    changes = {
        "job.dump_folder": str(folder / "again"),
        "checkpoint.initial_load_in_hf": True,
        "checkpoint.initial_load_path": str(exported),
    }
    started: list[Any] = []

    def look(trainer: Trainer) -> None:
        engine = trainer.pieces.engine

        def watched(model: Any, batch: Batch, *rest: Any) -> Any:
            if len(started) == 1:
                started.append(batch)
            return engine(model, batch, *rest)

        trainer.pieces.engine = watched
        started.append(weights_of(trainer))

    run = train(config_of(folder, RUN | here(folder), changes), look)
    return FirstStep(*started, run.losses[0][0])


def here(folder: Path) -> dict[str, Any]:
    """All ranks read and write one folder."""
    return {"job.dump_folder": str(folder / "run")}


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory) -> tuple[Path, Run]:
    folder = tmp_path_factory.mktemp("export")
    config_of(folder)  # writes the corpus
    return folder, run_ranks(4, train_on, folder)[0]


def test_one_process_exports_what_four_ranks_saved(four_ranks, tmp_path: Path) -> None:
    folder, run = four_ranks
    config_of(tmp_path)  # this process knows the flavor, too
    step = folder / "run" / "checkpoint" / "step-2"
    assert len(list(step.glob("__3_*.distcp"))) == 1
    export_checkpoint(step, tmp_path / "hf", "glm4_moe_hf", max_shard_size=20_000)
    import_checkpoint(tmp_path / "hf", tmp_path / "back", "glm4_moe_hf")
    found = weights(tmp_path / "back", load_toml(tmp_path / "back" / "config.toml"))
    assert same(found, run.weights)


def test_the_last_step_is_a_hugging_face_folder(four_ranks, tmp_path: Path) -> None:
    folder, _ = four_ranks
    config_of(tmp_path)
    export_checkpoint(folder / "run", tmp_path / "hf", "glm4_moe_hf")
    saved = folder / "run" / "checkpoint" / "step-2.hf"
    assert same(
        load_file(saved / "model.safetensors"), load_file(tmp_path / "hf/model.safetensors")
    )
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names < {file.name for file in saved.iterdir()}


def test_two_ranks_start_from_it_with_the_loss_that_transformers_computes(four_ranks) -> None:
    transformers = pytest.importorskip("transformers")
    folder, run = four_ranks
    exported = folder / "run/checkpoint/step-2.hf"
    ranks = run_ranks(2, start_from, folder, exported)
    assert all(same(first.weights, run.weights) for first in ranks)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported)
    tokens = torch.cat([first.batch.tokens for first in ranks])
    labels = torch.cat([first.batch.labels[..., 0] for first in ranks])
    with torch.no_grad():
        expected = F.cross_entropy(theirs(tokens).logits.flatten(0, 1), labels.flatten()).item()
    assert not torch.equal(ranks[0].batch.tokens, ranks[1].batch.tokens)
    assert all(abs(first.loss - expected) < 1e-4 for first in ranks)
