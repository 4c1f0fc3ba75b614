"""Checkpoints of several FSDP2 ranks: other numbers of ranks, background saves, common errors."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

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
    return model, optimizer, run.schedule.state_dict(), run.counter.state


def save(rank, folder, steps, config):
    run = make_run(folder, **config)
    run.train(steps, seed=0)  # the same tokens on every rank: the gradient of one
    assert run.checkpointer.save(steps)
    run.checkpointer.close()
    expected = whole(run)
    # Generators go on where they were, each rank's own.
    torch.manual_seed(100 + rank)
    assert run.checkpointer.save(steps + 2, force=True)
    run.checkpointer.close()
    return expected, torch.rand(3)


def load(rank, folder, config, train):
    run = make_run(folder, seed=rank + 1, **config)
    step = run.checkpointer.load()
    loaded = whole(run)
    draw = torch.rand(3)
    run.train(train, seed=5)
    return step, loaded, draw, whole(run)


def load_alone(folder, config, train):
    """As `load`, in this process without a process group."""
    run = make_run(folder, seed=1, sharded=False, **config)
    step = run.checkpointer.load()
    loaded = whole(run)
    run.train(train, seed=5)
    return step, loaded, whole(run)


def close_to(a, b):
    """Equality up to rounding of reductions over ranks."""
    if isinstance(a, torch.Tensor):
        return torch.allclose(a, b, atol=1e-5)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close_to(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(close_to, a, b))
    return a == b


@pytest.mark.parametrize("tied", [False, True])
def test_two_ranks_to_one_to_four(tmp_path, tied):
    config = {"tied": tied}
    saved = run_ranks(2, save, tmp_path, 2, {**config, "async_mode": "async"})
    expected = saved[0][0]
    manifest = read_manifest(tmp_path / "checkpoint" / "step-4")
    assert manifest.world_size == 2
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata"} == manifest.files.keys()

    again = run_ranks(2, load, tmp_path, config, 2)
    for (step, loaded, draw, after), (_, random) in zip(again, saved, strict=True):
        assert step == 4
        assert equal(loaded, expected)
        assert torch.equal(draw, random)
        assert equal(after, again[0][3])
    assert not torch.equal(again[0][2], again[1][2])

    step, loaded, after = load_alone(tmp_path, config, 2)
    assert step == 4
    assert equal(loaded, expected)
    assert close_to(after, again[0][3])

    for step, loaded, _, after in run_ranks(4, load, tmp_path, config, 2):
        assert step == 4
        assert equal(loaded, expected)
        assert close_to(after, again[0][3])


def test_one_process_to_two_ranks(tmp_path):
    run = make_run(tmp_path, sharded=False)
    run.train(2)
    run.checkpointer.save(2)
    for step, loaded, _, _ in run_ranks(2, load, tmp_path, {}, 0):
        assert step == 2
        assert equal(loaded, whole(run))


def load_into_other_heads(rank, folder, heads):
    model = make_run(folder / "other", heads=heads, enable=False).model
    report = load_model_weights(folder, model)
    assert isinstance(model.output.weight, DTensor)
    return report, get_model_state_dict(model, options=FULL)


def test_weights_of_two_ranks_into_other_heads_anywhere(tmp_path):
    run_ranks(2, save, tmp_path, 2, {})
    alone = TinyModel(heads=2, seed=9)
    load_model_weights(tmp_path, alone)
    for heads in (0, 3):
        for report, state in run_ranks(2, load_into_other_heads, tmp_path, heads):
            assert len(report.missing) == (2 if heads == 3 else 0)
            assert len(report.unexpected) == (0 if heads == 3 else 4)
            common = state.keys() & alone.state_dict().keys()
            assert len(common) == len(state) - len(report.missing)
            assert all(torch.equal(state[name], alone.state_dict()[name]) for name in common)


def fail_alike(rank, folder, load_step):
    try:
        make_run(folder, load_step=load_step).checkpointer.load()
    except UserError as error:
        return str(error)
    return "loaded"


def test_errors_are_the_same_on_every_rank(tmp_path):
    run_ranks(2, save, tmp_path, 2, {})
    shard = tmp_path / "checkpoint" / "step-4" / "__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    first, second = run_ranks(2, fail_alike, tmp_path, -1)
    assert first == second
    assert "__1_0.distcp: its SHA-256" in first
    missing, also = run_ranks(2, fail_alike, tmp_path, 3)
    assert missing == also
    assert "load_step = 3" in missing


def fail_to_write(rank, folder, async_mode):
    run = make_run(folder, async_mode=async_mode)
    run.train(2, seed=0)
    run.checkpointer.save(2)
    run.checkpointer.wait()
    if rank == 1:
        from torch.distributed.checkpoint import FileSystemWriter

        def fail(*_):
            raise OSError(28, "No space left on device")

        FileSystemWriter.write_data = fail
    try:
        run.checkpointer.save(4)
        run.checkpointer.close()
    except UserError as error:
        return str(error), sorted(entry.name for entry in run.checkpointer.folder.iterdir())
    return "saved", []


@pytest.mark.parametrize("async_mode", ["disabled", "async"])
def test_one_rank_that_cannot_write_fails_the_save_of_all(tmp_path, async_mode):
    for message, left in run_ranks(2, fail_to_write, tmp_path, async_mode):
        assert "No space left on device" in message
        assert "\n" not in message
        assert left == ["step-2"]
