"""What happens to one rank ends, stops or is skipped on both. The ranks are started once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from poison import leave_out_updates, poison

from runs import Run, config_of, finish, same, train, weights_of, write_corpus
from spawn import run_ranks
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.trainer import Trainer

SAVES: dict[str, Any] = {
    "checkpoint.enable": True,
    "checkpoint.interval": 2,
    "checkpoint.last_save_model_only": False,
}
SILENT = {"metrics.log_freq": 100}


def tell(trainer: Trainer, number: int) -> None:
    os.kill(os.getpid(), number)
    while not trainer.stopping.noticed:
        time.sleep(0.001)


def told_in_step(trainer: Trainer, step: int, number: int) -> None:
    engine, told = trainer.pieces.engine, []

    def be_told(*args: Any) -> Any:
        if trainer.state.step + 1 == step and not told:
            told.append(step)
            tell(trainer, number)
        return engine(*args)

    trainer.pieces.engine = be_told


def told_in_validation(trainer: Trainer, number: int) -> None:
    evaluate, told = trainer.evaluate, []

    def be_told(**options: Any) -> list[float]:
        if not told:
            told.append(number)
            tell(trainer, number)
        return evaluate(**options)

    trainer.evaluate = be_told  # type: ignore[method-assign]


def told_in_save(trainer: Trainer, number: int) -> None:
    write = trainer.checkpointer._write

    def be_told(*args: Any) -> None:
        if not trainer.stopping.noticed:
            tell(trainer, number)
        write(*args)

    trainer.checkpointer._write = be_told  # type: ignore[method-assign]


def stop_and_go_on(folder: Path, name: str, rank: int) -> tuple[Run, Run, list[str]]:
    """Only one rank is told. The run until then, what it saved, and the run that goes on."""
    keys = {**SAVES, "job.dump_folder": str(folder / name)}
    if name == "validation":
        keys |= {"validation.enable": True, "validation.freq": 3, "validation.dataset": "held_out"}
        keys |= {"validation.dataset_path": str(folder / "corpus.jsonl")}
    keys["checkpoint.async_mode"] = "disabled" if name == "step" else "async"

    def prepare(trainer: Trainer) -> None:
        if rank == 1 and name == "step":
            told_in_step(trainer, 3, signal.SIGTERM)
        if rank == 0 and name == "validation":
            told_in_validation(trainer, signal.SIGUSR1)
        if rank == 1 and name == "save":
            told_in_save(trainer, signal.SIGINT)

    first = train(config_of(folder, keys), prepare)
    saved = sorted(p.name for p in (folder / name / "checkpoint").glob("step-*"))
    return first, train(config_of(folder, keys)), saved


def meet_bad_batch(folder: Path, rank: int) -> tuple[str, list[str], bool]:
    """Rank 1's batch of step 3 is bad: what is said, what is saved, are the weights finite."""
    keys = {**SAVES, **SILENT, "checkpoint.interval": 1, "job.dump_folder": str(folder / "bad")}
    trainer = Trainer(config_of(folder, keys))
    if rank == 1:
        poison(trainer, {3})
    try:
        trainer.train()
        said = ""
    except UserError as error:
        said = str(error)
    finite = all(bool(w.isfinite().all()) for w in weights_of(trainer).values())
    finish(trainer)
    return said, sorted(p.name for p in (folder / "bad" / "checkpoint").glob("step-*")), finite


def skip(folder: Path, rank: int) -> tuple[Run, Run]:
    """Skipped because of rank 1, against an optimizer that nobody calls at that step."""
    keys = {"training.skip_nonfinite": 1, **SILENT}
    found = train(config_of(folder, keys), lambda t: poison(t, {3}) if rank == 1 else None)
    return found, train(config_of(folder, keys), lambda t: leave_out_updates(t, {3}))


def disagree(folder: Path, name: str, rank: int) -> str:
    """What each rank says when rank 1 has something else."""
    other: dict[str, Any] = {
        "lr": {"optimizer.lr": 0.5},
        "data": write_corpus(folder / "other", "jsonl", seed=5),
        "absent": {"training.dataset_path": str(folder / "nowhere.jsonl")},
    }
    keys = {"job.dump_folder": str(folder / name), "training.dataset": "corpus"}
    keys["training.dataset_path"] = str(folder / "corpus.jsonl")
    try:
        Trainer(config_of(folder, keys, other[name] if rank == 1 else {}))
    except UserError as error:
        return str(error)
    return ""


def everything(rank: int, folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {"whole": train(config_of(folder))}
    for name in ("step", "validation", "save"):
        results[name] = stop_and_go_on(folder, name, rank)
    results["bad"] = meet_bad_batch(folder, rank)
    results["skip"] = skip(folder, rank)
    results["disagree"] = {name: disagree(folder, name, rank) for name in ("lr", "data", "absent")}
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("faults")
    write_corpus(folder, "jsonl")
    return run_ranks(2, everything, folder)


@pytest.mark.parametrize("name", ["step", "validation", "save"])
def test_one_rank_is_told_and_both_stop_after_the_same_step(name, ranks):
    ends = {results[name][0].logged[-1]["step"] for results in ranks}
    assert len(ends) == 1
    end = ends.pop()
    # At most one step later than a barrier would tell.
    assert end in {"step": (3, 4), "validation": (3, 4), "save": (3, 4)}[name]
    first, second, saved = ranks[0][name]
    assert saved[-1] == f"step-{end}" and len(saved) == len(set(saved)) == (2 if end > 2 else 1)
    assert second.start == end
    assert first.losses + second.losses == ranks[0]["whole"].losses
    assert same(second.weights, ranks[0]["whole"].weights)


def test_a_bad_batch_on_one_rank_stops_both_before_the_update(ranks):
    for said, saved, finite in (results["bad"] for results in ranks):
        assert said.startswith("step 3: loss or gradient not finite")
        assert "it began on rank 1 with head 1, micro-batch 1, sequence 2" in said
        assert saved == ["step-1", "step-2"]
        assert finite


def test_a_bad_batch_on_one_rank_is_skipped_on_both(ranks):
    for found, expected in (results["skip"] for results in ranks):
        assert same(found.weights, expected.weights)
        assert found.logged[-1]["extra_metrics"] == {"skipped_steps": 1}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lr", "optimizer.lr differs between ranks: 0.0008 on rank 0, 0.5 on rank 1; give all"),
        ("data", "training data: source differs between ranks: "),
        ("absent", "nowhere.jsonl"),
    ],
)
def test_ranks_that_were_given_other_things_do_not_start(name, said, ranks):
    for rank in ranks:
        assert said in rank["disagree"][name] and "\n" not in rank["disagree"][name]
