"""Whole trainings on two gloo ranks: resume, other ranks, options; against one process.

The ranks are started once, run everything, and the tests look at what came of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from runs import (
    HEAD_BY_HEAD,
    JOINT,
    SEQUENTIAL,
    Run,
    config_of,
    finish,
    interrupt_after,
    largest_difference,
    same,
    train,
    validation,
)
from spawn import run_ranks
from torchtitan_mtp.trainer import Trainer
from two_ranks import counted

CURRICULUM = {"mtp.curriculum": "forward"}  # with heads that the optimizer has no state of yet
FAMILIES = {"joint": JOINT, "head_by_head": HEAD_BY_HEAD, "chain": {**SEQUENTIAL, **CURRICULUM}}
family = pytest.mark.parametrize("name", FAMILIES)
STEPS = {"training.steps": 4}
SAVES = {
    "checkpoint.enable": True,
    "checkpoint.interval": 2,
    "checkpoint.last_save_model_only": False,
}
FLOAT8 = {"model.converters": ["mtp", "quantize.linear.float8"]}
OPTIONS: dict[str, dict[str, Any]] = {
    "hsdp": {
        "parallelism.data_parallel_replicate_degree": 2,
        "parallelism.data_parallel_shard_degree": 1,
    },
    "not resharded": {"parallelism.fsdp_reshard_after_forward": "never"},
    "ac": {"activation_checkpoint.mode": "selective"},
    # The loss is compiled for a rank alone, as it is without others.
    "compile": {
        "compile.enable": True,
        "compile.components": ["model"],
        "compile.backend": "eager",
    },
    "offload": {"training.enable_cpu_offload": True},
    "accumulation": {"training.local_batch_size": 1, "training.global_batch_size": 4},
    "accumulation of whole gradients": {
        "training.local_batch_size": 1,
        "training.global_batch_size": 4,
        "training.reduce_every_micro_batch": False,
    },
}
FLOAT8_OPTIONS: dict[str, dict[str, Any]] = {
    "tensorwise": FLOAT8,
    "rowwise": {**FLOAT8, "quantize.linear.float8.recipe_name": "rowwise"},
    "float8 gather": {
        **FLOAT8,
        "quantize.linear.float8.enable_fsdp_float8_all_gather": True,
        "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp": True,
    },
}


def look_after_evaluation(sharded: list[bool]) -> Callable[[Trainer], None]:
    """For `prepare`: note whether all parameters are shards again once an evaluation is over."""

    def prepare(trainer: Trainer) -> None:
        evaluate = trainer.evaluate

        def evaluate_and_look(**options: Any) -> list[float]:
            losses = evaluate(**options)
            sharded.append(all(isinstance(p, DTensor) for p in trainer.model.parameters()))
            return losses

        trainer.evaluate = evaluate_and_look  # type: ignore[method-assign]

    return prepare


def count_reductions(folder: Path, keys: dict[str, Any], every: bool) -> list[int]:
    """Gradient reductions in each of three micro-batches of a step."""
    accumulate = {"training.global_batch_size": 12, "training.local_batch_size": 2}
    accumulate["training.reduce_every_micro_batch"] = every
    trainer = Trainer(config_of(folder, keys, accumulate))
    # What FSDP2 calls: the name before torch 2.13, and since.
    name = "reduce_scatter_single"
    name = name if hasattr(dist, name) else "reduce_scatter_tensor"
    engine, counts = trainer.pieces.engine, list[int]()

    def micro_batch(*args: Any) -> Any:
        with counted(dist, name) as reductions:  # clipping, after the last one, has its own
            output = engine(*args)
        counts.append(reductions.total())
        return output

    trainer.pieces.engine = micro_batch
    try:
        trainer.train_step()
    finally:
        finish(trainer)
    return counts


def everything(rank: int, folder: Path) -> dict[str, Any]:
    """On every rank; names -> what the tests below compare."""
    results: dict[str, Any] = {}
    for name, keys in FAMILIES.items():
        saves = {**STEPS, **keys, **SAVES}
        at = {what: folder / f"{name} {what}" for what in ("whole", "resumed", "alone")}
        whole = config_of(folder, saves, {"job.dump_folder": str(at["whole"])})
        results[f"{name} whole"] = train(whole)
        if rank == 0:  # what it had after step 2, for these ranks and for one process to go on from
            for what in ("resumed", "alone"):
                step = "checkpoint/step-2"
                shutil.copytree(at["whole"] / step, at[what] / step)
        dist.barrier()
        resumed = config_of(folder, saves, {"job.dump_folder": str(at["resumed"])})
        results[f"{name} resumed"] = train(resumed)
        sharded: list[bool] = []
        config = config_of(folder, STEPS, keys, validation(folder, 2))
        results[f"{name} validated"] = train(config, look_after_evaluation(sharded))
        results[f"{name} sharded"] = sharded
        results[f"{name} reductions"] = [count_reductions(folder, keys, x) for x in (True, False)]
    for option, more in OPTIONS.items():
        results[option] = train(config_of(folder, STEPS, HEAD_BY_HEAD, more))
    for option, more in FLOAT8_OPTIONS.items():
        saves = {**STEPS, **SAVES, **more, "job.dump_folder": str(folder / option)}
        train(config_of(folder, saves), interrupt_after(2))
        results[option] = train(config_of(folder, saves))
    return results


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict[str, Any]]:
    return run_ranks(2, everything, folder, timeout=240)


def alone(folder: Path, *changes: dict[str, Any]) -> Run:
    """One process with the global batch of two ranks."""
    return train(config_of(folder, STEPS, {"training.local_batch_size": 4}, *changes))


def assert_close_runs(a: Run, b: Run) -> None:
    torch.testing.assert_close(a.losses, b.losses, rtol=1e-5, atol=0)
    assert largest_difference(a.weights, b.weights) < 5e-5


@family
def test_ranks_agree(name, ranks):
    first, second = (results[f"{name} whole"] for results in ranks)
    assert first.losses == second.losses and same(first.weights, second.weights)


@family
def test_two_ranks_train_as_one_process(name, ranks, folder):
    assert_close_runs(ranks[0][f"{name} whole"], alone(folder, FAMILIES[name]))


@family
def test_resumed_on_as_many_ranks_to_the_bit(name, ranks):
    whole, resumed = (ranks[0][f"{name} {what}"] for what in ("whole", "resumed"))
    assert resumed.start == 2 and resumed.losses == whole.losses[2:]
    assert same(resumed.weights, whole.weights)


@family
def test_two_ranks_go_on_as_one_process(name, ranks, folder):
    """The same global batches, so the same losses; the tokens seen are the run's."""
    at = {**SAVES, "job.dump_folder": str(folder / f"{name} alone")}
    resumed, whole = alone(folder, FAMILIES[name], at), ranks[0][f"{name} whole"]
    assert resumed.start == 2
    torch.testing.assert_close(resumed.losses, whole.losses[2:], rtol=1e-5, atol=0)
    assert resumed.logged[-1]["n_tokens_seen"] == whole.logged[-1]["n_tokens_seen"]
    assert largest_difference(resumed.weights, whole.weights) < 5e-5


@family
def test_validation_is_the_same_on_any_ranks_and_leaves_nothing_stale(name, ranks, folder):
    """Parameters that stay gathered after an evaluation would be those of an older step."""
    whole, run = (ranks[0][f"{name} {what}"] for what in ("whole", "validated"))
    assert run.losses == whole.losses and same(run.weights, whole.weights)
    assert len(run.validated) == 2
    assert ranks[0][f"{name} sharded"] == [True, True]
    expected = alone(folder, FAMILIES[name], validation(folder, 2))
    torch.testing.assert_close(run.validated, expected.validated, rtol=1e-5, atol=0)
    assert run.acceptance == ranks[1][f"{name} validated"].acceptance
    for found, single in zip(run.acceptance, expected.acceptance, strict=True):
        assert found.drafted == single.drafted and min(found.drafted) > 100
        # Weights of two ranks and of one differ in their last bits: a tie may fall either way.
        torch.testing.assert_close(found.agreed, single.agreed, rtol=0, atol=2)


@family
def test_gradients_are_reduced_in_every_micro_batch_or_the_last(name, ranks):
    for results in ranks:
        # Two layers, two heads, the embedding, the norm and `output`.
        assert results[f"{name} reductions"] == [[7, 7, 7], [0, 0, 7]]


@pytest.mark.parametrize("option", OPTIONS)
def test_options_do_not_change_the_result(option, ranks):
    assert_close_runs(ranks[0][option], ranks[0]["head_by_head whole"])


@pytest.mark.parametrize("option", FLOAT8_OPTIONS)
def test_float8_trains_and_resumes(option, ranks, folder):
    run, plain = ranks[0][option], ranks[0]["joint whole"]
    assert run.start == 2
    assert run.losses != plain.losses[2:]
    torch.testing.assert_close(run.losses, plain.losses[2:], rtol=0.02, atol=0)
    # What was saved are plain weights, which a model without float8 reads.
    load = {**SAVES, "checkpoint.initial_load_path": str(folder / option), "training.steps": 1}
    unquantised = alone(folder / option, load)
    assert unquantised.weights.keys() == run.weights.keys()
    assert unquantised.losses[0][0] < plain.losses[0][0]
