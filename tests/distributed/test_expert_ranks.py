"""Experts that two gloo ranks share: what the ranks exchange, and whole trainings against one
process.

Losses and gradients of every family: test_gradients.py. The ranks are started once, run everything,
and the tests look at what came of it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from formats_run import weights
from runs import DEEPSEEK, JOINT, Interrupted, Run, config_of, same, train, weights_of
from spawn import run_ranks
from tests.small import DEEPSEEK as SHAPE
from tests.small import small_window
from torchtitan_mtp.config import MTP, JobConfig, Parallelism, load_toml
from torchtitan_mtp.data.targets import make_batch
from torchtitan_mtp.distributed.mesh import init_world
from torchtitan_mtp.distributed.parallelize import parallelize
from torchtitan_mtp.formats import export_checkpoint, import_checkpoint
from torchtitan_mtp.models import expert_parallel
from torchtitan_mtp.models.expert_parallel import ExpertParallel
from torchtitan_mtp.models.transformer import build_model
from torchtitan_mtp.mtp import ENGINES, add_heads
from torchtitan_mtp.ops import LossOptions
from torchtitan_mtp.trainer import Trainer
from two_ranks import (
    HALFWAY,
    STEPS,
    Trainings,
    assert_trained_alike,
    blocks,
    counted,
    train_on_rank,
)

RUNS: dict[str, dict[str, Any]] = {  # of two sequences a step: one for each rank
    "chain": {
        **DEEPSEEK,
        **HALFWAY,
        "model.args.norm_eps": 1e-6,  # as transformers has it
        "activation_checkpoint.mode": "full",
    },
    "parallel": {
        **DEEPSEEK,
        "mtp.heads": "parallel",
        "training.steps": 2,
        "activation_checkpoint.mode": "selective",
        "activation_checkpoint.selective_ac_option": "op",
        "compile.enable": True,
        "compile.components": ["model"],
        "compile.backend": "aot_eager",
        "optimizer.implementation": "foreach",
    },
    "joint": {
        **DEEPSEEK,
        **JOINT,
        "mtp.heads": "parallel",
        "training.steps": 2,
        "model.args.moe.aux_loss_coeff": 0.5,
    },
}
ONE, TWO = ({"training.local_batch_size": size, "training.global_batch_size": 2} for size in (2, 1))
TRAININGS = Trainings(RUNS, {**TWO, "parallelism.expert_parallel_degree": 2}, ONE)

# Rows for experts 0 to 3, sorted, of which rank 0 has the first two. The second case leaves rank 1
# without rows, and most experts too.
CASES = [([0, 1, 1, 3], [1, 2]), ([0, 0], [1]), ([], [2, 3, 3])]


def exchanged(rank: int, case: tuple[list[int], list[int]]) -> dict[str, Any]:
    """A row's value is 10 * its place + its rank; expert e adds 1000 * e times the row's weight."""
    ranks, own = ExpertParallel(dist.group.WORLD), case[rank]
    rows = torch.tensor([10.0 * i + rank for i in range(len(own))]).view(-1, 1).requires_grad_()
    weights = torch.full((len(own),), rank + 1.0, requires_grad=True)
    seen: dict[str, Any] = {}

    def experts(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
        seen.update(rows=x.flatten().tolist(), offsets=offsets.tolist())
        sizes = torch.diff(offsets, prepend=offsets.new_zeros(1))
        expert = 2 * rank + torch.arange(2).repeat_interleave(sizes)
        return x + (1000.0 * expert * w).unsqueeze(1)

    counts = torch.tensor(own, dtype=torch.int64).bincount(minlength=4).int()
    out = ranks.run(experts, rows, weights, counts)
    (out.flatten() * torch.arange(1, len(own) + 1)).sum().backward()
    seen |= {"out": out.flatten().tolist(), "d_rows": rows.grad.flatten().tolist()}
    return seen | {"d_weights": weights.grad.tolist()}


def collectives(mtp: MTP, ac: str) -> Counter[str]:
    """What ranks exchange in a step of one micro-batch, by dtype."""
    config = JobConfig()
    config.mtp, config.parallelism = mtp, Parallelism(expert_parallel_degree=2)
    config.activation_checkpoint.mode, config.activation_checkpoint.selective_ac_option = ac, "op"
    world = init_world(config.parallelism)
    model = add_heads(build_model(replace(SHAPE, n_layers=2)), mtp)
    model = parallelize(model, config, world, torch.float32, seed=0)
    n = mtp.num_future_tokens
    batch = make_batch(small_window(2, 9 + n, seed=world.rank), n)

    def what(x: Tensor, *_: Any) -> str:
        return "counts" if x.dtype == torch.int32 else "rows and weights"

    with counted(expert_parallel, "_all_to_all", what=what) as counts:
        ENGINES[mtp.engine](model, batch, torch.ones(n), LossOptions(), True)
    return counts


def everything(rank: int, folder: Path) -> dict[str, Any]:
    began: dict[str, Tensor] = {}
    look = {"joint": lambda trainer: began.update(weights_of(trainer))}
    results: dict[str, Any] = {"exchanged": [exchanged(rank, case) for case in CASES]}
    results["counts"] = {name: collectives(*step) for name, step in STEPS.items()}
    return {**results, **TRAININGS.on_ranks(folder, look), "began": began}


@pytest.fixture(scope="module")
def alone(folder) -> Run:
    return TRAININGS.alone(folder)


@pytest.fixture(scope="module")
def ranks(folder, alone) -> list[dict[str, Any]]:
    return run_ranks(2, everything, folder, timeout=240)


def test_what_ranks_exchange(ranks):
    """Of each expert, rows lie by rank and then as they lay there; gradients go the way back."""
    first, second = (results["exchanged"] for results in ranks)
    assert (first[0]["rows"], first[0]["offsets"]) == ([0, 10, 20, 1], [1, 4])
    assert (second[0]["rows"], second[0]["offsets"]) == ([11, 30], [1, 2])
    assert first[0]["out"] == [0, 1010, 1020, 3030]
    assert second[0]["out"] == [2001, 4011]
    assert first[0]["d_rows"] == [1, 2, 3, 4] and second[0]["d_rows"] == [1, 2]
    assert first[0]["d_weights"] == [0, 2000, 3000, 12000]
    assert second[0]["d_weights"] == [1000, 4000]


def test_ranks_and_experts_without_rows(ranks):
    first, second = (results["exchanged"] for results in ranks)
    assert (first[1]["rows"], first[1]["offsets"]) == ([0, 10, 1], [2, 3])
    assert (second[1]["rows"], second[1]["offsets"]) == ([], [0, 0])
    assert (first[1]["out"], second[1]["out"]) == ([0, 10], [2001])
    assert (first[2]["rows"], first[2]["out"]) == ([], [])
    assert second[2]["rows"] == [1, 11, 21] and second[2]["offsets"] == [1, 3]
    assert second[2]["out"] == [4001, 6011, 6021] and second[2]["d_rows"] == [1, 2, 3]


def test_heads_add_only_their_own_collectives(ranks):
    """A block sends counts, rows, weights and outputs, and three gradients back; what is computed
    anew is sent anew. The plain model has one block with experts; one of its two is dense."""
    for name, found in ranks[0]["counts"].items():
        once, again = blocks(name, layers=1)
        assert found == {"counts": once + again, "rows and weights": 6 * once + 3 * again}, name


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_train_as_one_process(name, ranks, alone, folder):
    """Losses, gradient norms, loads and biases: recomputed blocks and validation; saved exchanges,
    compiled blocks and the foreach optimizer; the joint engine and the balance loss."""
    expected = alone if name == "chain" else TRAININGS.run(folder, name, "alone")
    assert_trained_alike([results[name] for results in ranks], expected)
    first = ranks[0][name]
    biases = {name for name in expected.weights if name.endswith(".expert_bias")}
    assert biases and all(torch.equal(first.weights[b], expected.weights[b]) for b in biases)


def test_checkpoints_go_from_one_layout_to_the_other(ranks, alone, folder):
    """Two steps more: one process from what two ranks saved, and the reverse."""
    TRAININGS.assert_go_on(folder, alone, ranks[0]["chain"], ranks[0]["resumed"])


def test_weights_begin_and_are_exported_as_those_of_one_process(ranks, folder, tmp_path):
    began: dict[str, Tensor] = {}

    def look(trainer: Trainer) -> None:
        began.update(weights_of(trainer))
        raise Interrupted

    with contextlib.suppress(Interrupted):
        train(config_of(folder, ONE, RUNS["joint"]), look)
    assert same(ranks[1]["began"], began)
    export_checkpoint(folder / "chain ranks", tmp_path / "hf", "deepseek_v3_hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "back", "deepseek_v3_hf")
    found = weights(tmp_path / "back", load_toml(tmp_path / "back" / "config.toml"))
    assert same(found, ranks[0]["chain"].weights)


@pytest.mark.exhaustive
@pytest.mark.parametrize("converters", [["mtp"], ["mtp", "quantize.linear.float8"]])
def test_bfloat16_and_float8_stay_close(converters, folder):
    """Their scales are of a rank's own tokens."""
    keys = {**DEEPSEEK, "model.converters": converters, "training.steps": 3}
    keys |= {"training.mixed_precision_param": "bfloat16", "quantize.linear.float8.emulate": True}
    found, _ = run_ranks(2, train_on_rank, folder, TRAININGS.of_ranks, keys)
    expected = train(config_of(folder, ONE, keys))
    torch.testing.assert_close(found.losses, expected.losses, rtol=0.02, atol=0)
