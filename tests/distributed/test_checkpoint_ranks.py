"""Checkpoints of several FSDP2 ranks: other numbers of ranks, background saves, common errors."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torchao.float8 import Float8LinearConfig, convert_to_float8_training

from spawn import run_ranks

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "checkpoint"))

from checkpoint_run import Run, TinyModel, equal

from torchtitan_mtp.checkpoint import load_model_weights
from torchtitan_mtp.checkpoint.manifest import read_manifest
from torchtitan_mtp.errors import UserError

FULL = StateDictOptions(full_state_dict=True)


def make_run(folder, *, heads=2, tied=False, seed=0, sharded=True, **config):
    model = TinyModel(heads, tied, seed)
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        heads_blocks = model.mtp.heads.values() if model.mtp else []
        for block in (*model.layers.values(), *heads_blocks):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return Run(folder, model=model, **config)


def whole(run):
    """Model, optimizer and the rest, gathered: the same on any number of ranks."""
    model = get_model_state_dict(run.model, options=FULL)
    optimizer = get_optimizer_state_dict(run.model, run.optimizer, options=FULL)
    return copy.deepcopy((model, optimizer, run.schedule.state_dict(), run.counter.state))


def save_two_steps(folder, rank, **config):
    """Save steps 2 and 4; returns the state at step 4 and what the generator draws next."""
    run = make_run(folder, **config)
    for step in (2, 4):
        run.train(2, seed=0)  # the same tokens on every rank: the gradient of one
        torch.manual_seed(100 + rank)  # but generators of their own
        assert run.checkpointer.save(step)
    run.checkpointer.close()
    return whole(run), torch.rand(3)


def load(folder, **config):
    """Resume in a new run; returns the step, its state, the next draw, the state 2 steps later."""
    run = make_run(folder, seed=1, **config)
    step = run.checkpointer.load()
    loaded = whole(run)
    draw = torch.rand(3)
    run.train(2, seed=5)
    return step, loaded, draw, whole(run)


def save_and_load(rank, folder, tied):
    return save_two_steps(folder, rank, tied=tied, async_mode="async"), load(folder, tied=tied)


def load_both(rank, folder):
    return [load(folder / str(tied), tied=tied) for tied in (False, True)]


def close_to(a, b):
    """Equality up to rounding of reductions over ranks."""
    if isinstance(a, torch.Tensor):
        return torch.allclose(a, b, atol=1e-5)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close_to(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(close_to, a, b))
    return a == b


def save_both(rank, folder):
    return [save_and_load(rank, folder / str(tied), tied) for tied in (False, True)]


@pytest.mark.slow
def test_two_ranks_to_one_to_four(tmp_path):
    """With and without tied embeddings, in one go: starting ranks is what takes the time."""
    on_two = run_ranks(2, save_both, tmp_path)
    on_four = run_ranks(4, load_both, tmp_path)
    for index, tied in enumerate((False, True)):
        folder = tmp_path / str(tied)
        manifest = read_manifest(folder / "checkpoint" / "step-4")
        assert manifest.world_size == 2
        assert {"__0_0.distcp", "__1_0.distcp", ".metadata"} == manifest.files.keys()
        expected = on_two[0][index][0][0]
        expected_after = on_two[0][index][1][3]

        for (_, drawn), (step, loaded, draw, after) in (rank[index] for rank in on_two):
            assert step == 4
            assert equal(loaded, expected)
            assert torch.equal(draw, drawn)
            assert equal(after, expected_after)
        assert not torch.equal(on_two[0][index][1][2], on_two[1][index][1][2])

        alone = load(folder, tied=tied, sharded=False)
        for step, loaded, _, after in (alone, *(rank[index] for rank in on_four)):
            assert step == 4
            assert equal(loaded, expected)
            assert close_to(after, expected_after)


def load_on_rank(rank, folder):
    """What `load` gives, and each parameter's second moments, gathered, without head and layer."""
    run = make_run(folder, seed=1, exclude_from_loading=["mtp", "layers.0"])
    run.checkpointer.load()
    state = {n: run.optimizer.state[p] for n, p in run.model.named_parameters()}
    return load(folder), {n: s["exp_avg_sq"].full_tensor() for n, s in state.items() if s}


def test_one_process_to_two_ranks(tmp_path):
    expected, _ = save_two_steps(tmp_path, 0, sharded=False)
    for (step, loaded, _, _), moments in run_ranks(2, load_on_rank, tmp_path):
        assert step == 4
        assert equal(loaded, expected)
        saved = {name: state["exp_avg_sq"] for name, state in expected[1]["state"].items()}
        assert equal(
            moments, {n: m for n, m in saved.items() if not n.startswith(("mtp", "layers.0"))}
        )


def load_into_other_heads(rank, folder):
    save_two_steps(folder, rank)
    results = []
    for heads in (0, 3):
        model = make_run(folder / "other", heads=heads, enable=False).model
        report = load_model_weights(folder, model)
        assert isinstance(model.output.weight, DTensor)
        results.append((report, get_model_state_dict(model, options=FULL)))
    return results


def test_weights_of_two_ranks_into_other_heads_anywhere(tmp_path):
    results = run_ranks(2, load_into_other_heads, tmp_path)
    alone = TinyModel(heads=2, seed=9)
    load_model_weights(tmp_path, alone)
    expected = alone.state_dict()
    for (without, bare), (with_3, wide) in results:
        assert (len(without.missing), len(without.unexpected)) == (0, 4)
        assert (len(with_3.missing), len(with_3.unexpected)) == (2, 0)
        assert all(torch.equal(value, expected[name]) for name, value in bare.items())
        assert all(torch.equal(wide[name], value) for name, value in expected.items())


def failure(folder, **config):
    try:
        make_run(folder, **config).checkpointer.load()
    except UserError as error:
        return str(error)
    return "loaded"


def fail_alike(rank, folder):
    save_two_steps(folder, rank)
    if rank == 0:
        shard = folder / "checkpoint" / "step-4" / "__1_0.distcp"
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    dist.barrier()
    return failure(folder), failure(folder, load_step=3), failure(folder, heads=3, load_step=2)


def test_errors_are_the_same_on_every_rank(tmp_path):
    first, second = run_ranks(2, fail_alike, tmp_path)
    assert first == second
    damaged, absent, heads = first
    assert "__1_0.distcp: bytes 0 to " in damaged
    assert "load_step = 3" in absent
    assert "lacks 2 (mtp.heads.2" in heads


def full_disk(*_):
    raise OSError(28, "No space left on device")


def fail_to_write(rank, folder, async_mode):
    run = make_run(folder, async_mode=async_mode)
    run.train(2, seed=0)
    run.checkpointer.save(2)
    run.checkpointer.wait()
    if rank == 1:
        FileSystemWriter.write_data = full_disk
    try:
        run.checkpointer.save(4)
        run.checkpointer.close()
    except UserError as error:
        dist.barrier()  # rank 0 clears up
        return str(error), sorted(entry.name for entry in run.checkpointer.folder.iterdir())
    return "saved", []


def test_one_rank_that_cannot_write_fails_the_save_of_all(tmp_path):
    for message, left in run_ranks(2, fail_to_write, tmp_path, "async"):
        assert "No space left on device" in message
        assert "\n" not in message
        assert left == ["step-2"]


def float8_run(folder, seed):
    """Weights wrapped by torchao, so that FSDP2 gathers them in float8."""
    model = TinyModel(seed=seed)
    recipe = Float8LinearConfig(enable_fsdp_float8_all_gather=True, emulate=True)
    layers = model.layers
    convert_to_float8_training(layers, config=recipe)
    for block in layers.values():
        fully_shard(block)
    fully_shard(model)
    return Run(folder, model=model)


def save_and_load_float8(rank, folder):
    run = float8_run(folder, seed=0)
    run.train(2, seed=0)
    run.checkpointer.save(2)
    resumed = float8_run(folder, seed=1)
    assert resumed.checkpointer.load() == 2
    weight = resumed.model.layers["0"].wq.weight.to_local()
    assert type(weight).__name__ == "WeightWithDynamicFloat8CastTensor"
    return run.train(2, seed=3), resumed.train(2, seed=3)


def test_float8_all_gather_weights_are_saved_as_plain_tensors(tmp_path):
    for uninterrupted, resumed in run_ranks(2, save_and_load_float8, tmp_path):
        assert uninterrupted == resumed
    plain = make_run(tmp_path, sharded=False)
    assert plain.checkpointer.load() == 2
