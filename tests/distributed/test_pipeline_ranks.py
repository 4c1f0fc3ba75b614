"""Pipelines on two gloo ranks: whole trainings against one process, and from one to the other.

Losses and gradients of every family and schedule: test_gradients.py. The ranks are started once,
run everything, and the tests look at what came of it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from runs import DEEPSEEK, SEQUENTIAL, Run, config_of, train
from spawn import run_ranks
from torchtitan_mtp.checkpoint import folders
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.monitoring.losses import StepLosses
from torchtitan_mtp.trainer import Trainer
from two_ranks import HALFWAY, Trainings, assert_close, assert_trained_alike

PIPELINE = {"parallelism.pipeline_parallel_degree": 2}
RUNS: dict[str, dict[str, Any]] = {  # schedules and micro-batches are the ranks' alone
    # Both ranks have the embedding. Two micro-batches of two sequences, of windows with two.
    "tied chain": {
        **SEQUENTIAL,
        **HALFWAY,
        "model.args.tied_embeddings": True,
        "training.global_batch_size": 4,
        "activation_checkpoint.mode": "selective",
        "optimizer.implementation": "foreach",
        "parallelism.pipeline_parallel_microbatch_size": 2,
        "parallelism.pipeline_parallel_schedule": "GPipe",
    },
    "experts": {**DEEPSEEK, "training.steps": 2, "model.args.moe.aux_loss_coeff": 0.5},
    "several stages": {
        "model.args.n_layers": 4,
        "training.steps": 2,
        "training.global_batch_size": 4,
        "mtp.engine": "joint",
        "mtp.target": "trunk",
        "validation.enable": True,
        "parallelism.pipeline_parallel_schedule": "InterleavedZeroBubble",
    },
}
TRAININGS = Trainings(RUNS, of_ranks=PIPELINE)
SAVED = "tied chain"
CASES = [SAVED, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in list(RUNS)[1:])]


def low(folder: Path, where: str) -> dict[str, Any]:
    """Parallel heads that take turns; gradients are kept in another dtype than they come in. It
    excludes what another stage has."""
    return {
        "checkpoint.enable": True,
        "checkpoint.load_only": True,
        "checkpoint.exclude_from_loading": ["layers.0", "output"],
        "training.mixed_precision_param": "bfloat16",
        "training.steps": 2,
        "job.dump_folder": str(folder / f"low {where}"),
    }


def spoil(trainer: Trainer) -> None:
    """On the first stage, which has no losses."""
    if trainer.world.rank == 0:
        with torch.no_grad():
            trainer.model.layers["0"].ffn_norm.weight.fill_(torch.inf)


def largest_loss(rank: int, lost: int) -> float:
    """Of a step in which rank `lost` has a loss that is no number."""
    losses, loss = StepLosses(1, torch.device("cpu")), math.nan if rank == lost else 2.0
    losses.add(*map(torch.tensor, (loss, [loss], [1], [1])))
    return losses.reduce().max_loss


def note_sizes(sizes: list[int]) -> None:
    """Keep the bytes that every save from now on asks for."""
    start = folders.start_writing

    def noted(folder: Path, step: int, total: int) -> None:
        sizes.append(total)
        start(folder, step, total)

    folders.start_writing = noted


def on_ranks(rank: int, folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {"sizes": list[int]()}
    note_sizes(found["sizes"])
    found["run"] = TRAININGS.run(folder, name, "ranks")
    if name == SAVED:
        found["low"] = train(config_of(folder, PIPELINE, low(folder, "ranks")))
        found["resumed"] = TRAININGS.run(folder, name, "resumed")
        with pytest.raises(UserError) as error:
            TRAININGS.run(folder, name, "spoiled", spoil)
        found["error"] = str(error.value)
        found["largest"] = [largest_loss(rank, lost) for lost in (0, 1, 2)]
    return found


@pytest.fixture(scope="module", params=CASES)
def case(request, folder) -> tuple[str, Path, Run, list[dict[str, Any]]]:
    """A run's name, folder, what one process made of it, which saves what the ranks go on from,
    and what each rank made of it."""
    name = request.param
    alone = TRAININGS.alone(folder) if name == SAVED else TRAININGS.run(folder, name, "alone")
    return name, folder, alone, run_ranks(2, on_ranks, folder, name, timeout=240)


def test_two_ranks_train_as_one_process(case):
    """With checkpointed blocks, tied embeddings and a chain; experts with a balance loss; several
    stages a rank, and backwards in two parts."""
    _, _, expected, ranks = case
    assert_trained_alike([found["run"] for found in ranks], expected)
    largest = [[s["global_max_loss"] for s in run.logged] for run in (ranks[0]["run"], expected)]
    assert_close(*largest)


def test_bfloat16_stays_close(case):
    name, folder, _, ranks = case
    if name != SAVED:
        return
    expected = train(config_of(folder, low(folder, "alone")))
    torch.testing.assert_close(ranks[1]["low"].losses, expected.losses, rtol=1e-3, atol=0)


def test_each_rank_has_its_layers(case):
    name, _, alone, ranks = case
    first, second = (found["run"].weights for found in ranks)
    assert first.keys() | second.keys() == alone.weights.keys()
    both = {"tok_embeddings.weight"} if name in ("tied chain", "experts") else set()
    assert first.keys() & second.keys() == both
    assert all(torch.equal(first[weight], second[weight]) for weight in both)
    assert "layers.0.attention.wq.weight" in first or name == "experts"
    assert "tok_embeddings.weight" in first and "norm.weight" in second


def test_checkpoints_go_from_one_layout_to_the_other(case):
    """Two steps more: one process from what two ranks saved, and the reverse."""
    name, folder, alone, ranks = case
    if name != SAVED:
        return
    TRAININGS.assert_go_on(folder, alone, ranks[0]["run"], ranks[0]["resumed"])


def test_room_is_asked_for_the_tensors_of_all_stages(case):
    """Of the embedding, which two of them have, twice."""
    name, folder, _, ranks = case
    if name != SAVED:
        return
    stored = FileSystemReader(folder / f"{name} ranks/checkpoint/step-2").read_metadata()
    sizes = {
        key: entry.size.numel() * entry.properties.dtype.itemsize
        for key, entry in stored.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    twice = sum(size for key, size in sizes.items() if "tok_embeddings" in key)
    assert ranks[0]["sizes"][0] == sum(sizes.values()) + twice > 2 * twice > 0


def test_what_is_not_finite_is_found_on_another_stage(case):
    name, _, _, ranks = case
    if name != SAVED:
        return
    for found in ranks:
        assert "it began on rank 1 with head 1, micro-batch 1, sequence 1" in found["error"]
        assert "layers.0.ffn_norm.weight itself is not finite" in found["error"]
        assert str(found["largest"]) == "[nan, nan, 2.0]"
