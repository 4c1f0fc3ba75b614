"""What one layout of four ranks saved, any other loads, and goes on with the same data."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from runs import DEEPSEEK, Run, config_of, same, train, weights_of, write_corpus
from spawn import run_ranks

LAYOUTS: dict[str, dict[str, int]] = {  # degrees; data_parallel_shard_degree is what is left
    "fsdp": {},
    "hsdp": {"data_parallel_replicate_degree": 2},
    "cp": {"context_parallel_degree": 2},
    "ep": {"expert_parallel_degree": 2},
    "ep alone": {"expert_parallel_degree": 4},
    "tp": {"tensor_parallel_degree": 2},
    "pp": {"pipeline_parallel_degree": 2},
}
KEYS = {
    **DEEPSEEK,
    "model.vocab_size": 264,
    "training.steps": 10,
    "training.local_batch_size": 1,
    "training.global_batch_size": 4,
    "checkpoint.enable": True,
    "checkpoint.interval": 5,
    "checkpoint.last_save_model_only": False,
}


def run_on(layout: str, folder: Path, name: str) -> tuple[Run, dict[str, Tensor]]:
    """The run in folder/name from where it is to its end, and the weights that it began with."""
    degrees = {f"parallelism.{key}": degree for key, degree in LAYOUTS[layout].items()}
    began: dict[str, Tensor] = {}
    at = {"job.dump_folder": str(folder / name)}
    run = train(config_of(folder, KEYS, degrees, at), lambda t: began.update(weights_of(t)))
    return run, began


def everything(rank: int, folder: Path) -> dict[Any, Any]:
    """From (the layout that saved, the one that went on) to what came of it."""
    found: dict[Any, Any] = {layout: run_on(layout, folder, layout)[0] for layout in LAYOUTS}
    for saved, loaded in itertools.product(LAYOUTS, repeat=2):
        name = f"{saved} to {loaded}"
        if rank == 0:
            step = "checkpoint/step-5"
            shutil.copytree(folder / saved / step, folder / name / step)
        torch.distributed.barrier()
        found[saved, loaded] = run_on(loaded, folder, name)
    return found if rank in (0, 3) else {}


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_any_layout_goes_on_from_any(tmp_path):
    write_corpus(tmp_path, "jsonl")
    first, *_, last = run_ranks(4, everything, tmp_path, timeout=1100)
    for saved, loaded in itertools.product(LAYOUTS, repeat=2):
        pairs = ((saved, loaded), (saved, saved))  # of a pipeline, each rank has a part
        began, expected = ({**first[pair][1], **last[pair][1]} for pair in pairs)
        assert same(began, expected), (saved, loaded)
        for found in (first, last):
            run = found[saved, loaded][0]
            assert run.start == 5
            torch.testing.assert_close(
                run.losses, found[saved].losses[5:], rtol=1e-5, atol=0, msg=f"{saved} to {loaded}"
            )
