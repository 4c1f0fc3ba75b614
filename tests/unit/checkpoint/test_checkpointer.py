"""Saving and resuming a run in one process: exactness, and which checkpoint is meant when."""

import logging
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from checkpoint_run import Run, TinyModel, equal, snapshot
from torch.distributed.checkpoint import FileSystemWriter

from torchtitan_mtp.checkpoint import find_checkpoint, load_model_weights
from torchtitan_mtp.checkpoint.manifest import read_manifest
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.optimizer import Schedule


def steps(folder: Path) -> list[str]:
    return sorted(entry.name for entry in (folder / "checkpoint").iterdir())


def resume(folder: Path, **config) -> tuple[Run, int | None]:
    run = Run(folder, seed=1, **config)
    return run, run.checkpointer.load()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("async_mode", ["disabled", "async", "async_with_pinned_mem"])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, async_mode, tied):
    run = Run(tmp_path, async_mode=async_mode, tied=tied)
    run.train(2)
    assert run.checkpointer.save(2)
    saved = snapshot(run)
    expected = run.train(3), random.random(), np.random.rand()
    run.checkpointer.close()
    after = snapshot(run)

    resumed = Run(tmp_path, seed=1, tied=tied)
    assert not equal(snapshot(resumed), saved)
    assert resumed.checkpointer.load() == 2
    assert equal(snapshot(resumed), saved)
    assert (resumed.train(3), random.random(), np.random.rand()) == expected
    assert equal(snapshot(resumed), after)
    if tied:
        assert resumed.model.output.weight is resumed.model.tok_embeddings.weight


def test_background_saves_hold_the_state_of_their_own_step(tmp_path):
    run = Run(tmp_path, async_mode="async", keep_latest_k=0)
    expected = {}
    for step in (2, 4, 6):
        run.train(2)
        run.checkpointer.save(step)
        expected[step] = snapshot(run)
    run.checkpointer.close()
    for step, state in expected.items():
        resumed, found = resume(tmp_path, load_step=step)
        assert found == step
        assert equal(snapshot(resumed), state)


@pytest.mark.parametrize("told", ["at the next step", "at the end"])
def test_failed_background_save_is_reported_and_leaves_nothing(tmp_path, monkeypatch, told):
    def fail(*_):
        raise OSError(28, "No space left on device", "shard")

    run = Run(tmp_path, async_mode="async")
    run.train(2)
    monkeypatch.setattr(FileSystemWriter, "write_data", fail)
    run.checkpointer.save(2)
    with pytest.raises(UserError, match=r"step-2.*can't be saved: .*No space left") as error:
        while told == "at the next step":
            assert not run.checkpointer.save(3)  # not due
        run.checkpointer.close()
    assert "\n" not in str(error.value)
    assert steps(tmp_path) == []


@pytest.mark.parametrize(
    ("step", "last", "config", "expected"),
    [
        (1, False, {}, False),
        (1, False, {"enable_first_step_checkpoint": True}, True),
        (3, False, {}, False),
        (4, False, {}, True),
        (3, True, {}, True),
        (0, False, {}, False),
        (0, True, {}, True),
        (4, True, {"load_only": True}, False),
        (4, True, {"enable": False}, False),
    ],
)
def test_when_to_save(tmp_path, step, last, config, expected):
    run = Run(tmp_path, **config)
    assert run.checkpointer.should_save(step, last) is expected
    assert run.checkpointer.save(step, last) is expected
    assert (tmp_path / "checkpoint").exists() is expected


def test_forced_save_is_full_even_at_an_odd_last_step(tmp_path):
    run = Run(tmp_path)
    run.train(3)
    assert run.checkpointer.save(3, last=True, force=True)
    resumed, step = resume(tmp_path)
    assert step == 3
    assert equal(snapshot(resumed), snapshot(run))


def test_disabled_neither_saves_nor_loads(tmp_path, caplog):
    Run(tmp_path).checkpointer.save(0, last=True)
    run = Run(tmp_path, enable=False, initial_load_path=str(tmp_path))
    assert run.checkpointer.save(2, force=True) is False
    assert run.checkpointer.load() is None
    assert "initial_load_path is ignored" in caplog.text
    assert steps(tmp_path) == ["step-0"]


def test_nothing_to_resume(tmp_path):
    assert resume(tmp_path)[1] is None


def test_what_another_continuation_left_is_kept_aside(tmp_path, caplog):
    """What was trained is saved, and what is in its place is kept, however often that happens."""
    old = Run(tmp_path)
    for step in (2, 4, 6):
        old.train(2)
        old.checkpointer.save(step, last=step == 6)
    for again in range(2):
        run, step = resume(tmp_path, load_step=2)
        run.train(2, seed=again)
        assert step == 2 and run.checkpointer.save(4)
        assert run.checkpointer.save(4)  # which it holds: nothing is written
        assert equal(snapshot(resume(tmp_path)[0]), snapshot(run))
        # Nor are the weights of the old end the newest any longer, for what reads them.
        assert find_checkpoint(tmp_path).name == "step-4"
        left = ["step-2", "step-4", "step-4.full", "step-4.full.2", "step-6.model_only"]
        assert steps(tmp_path) == [name for name in left if again or name != "step-4.full.2"]
    run, step = resume(tmp_path)
    run.train(2)
    assert step == 4 and run.checkpointer.save(6, last=True)
    weights = TinyModel(seed=5)
    load_model_weights(tmp_path / "checkpoint" / "step-6", weights)
    assert equal(dict(weights.state_dict()), dict(run.model.state_dict()))
    # Counting from step 0 again, every step is in the way of what is trained from there.
    seed = Run(tmp_path)
    seed.checkpointer.save(0, last=True)
    caplog.set_level(logging.INFO)
    run, step = resume(tmp_path, exclude_from_loading=["train_state"])
    assert step == 0 and "step-4 at step 0" in caplog.text
    assert caplog.text.count("as excluded: lr_scheduler, train_state\n") == 1
    run.train(1)
    run.checkpointer.save(1, force=True)
    assert resume(tmp_path)[1] == 1 and find_checkpoint(tmp_path).name == "step-1"
    assert [name for name in steps(tmp_path) if "." not in name] == ["step-0", "step-1"]


def test_the_present_hyperparameters_count(tmp_path):
    """Of the optimizer and the schedule only moments and counts come back."""
    saved = Run(tmp_path)
    saved.train(2)
    saved.checkpointer.save(2)

    def other(**config):
        run = Run(tmp_path, **config)
        run.optimizer = torch.optim.AdamW(
            run.model.parameters(), lr=0.001, betas=(0.8, 0.9), weight_decay=0.5, eps=1e-5
        )
        run.schedule = Schedule(run.optimizer, lambda s: 1 / (10 + s))
        run.checkpointer.optimizer = run.optimizer
        run.checkpointer.extra["lr_scheduler"] = run.schedule
        run.checkpointer.load()
        return run

    run = other()
    group = run.optimizer.param_groups[0]
    found = [group[key] for key in ("betas", "weight_decay", "eps", "lr")]
    assert found == [(0.8, 0.9), 0.5, 1e-5, 0.001 * (1 / 12)]
    assert equal(run.optimizer.state_dict()["state"], saved.optimizer.state_dict()["state"])
    for excluded, step in (("lr_scheduler", 0), ("train_state", 0), ("optimizer", 2)):
        group = other(exclude_from_loading=[excluded]).optimizer.param_groups[0]
        assert group["lr"] == 0.001 * (1 / (10 + step)), excluded


def test_model_only_last_save_does_not_stand_in_the_way(tmp_path, caplog):
    run = Run(tmp_path, export_dtype="bfloat16")
    run.train(2)
    run.checkpointer.save(2)
    saved = snapshot(run)
    run.train(2)
    assert run.checkpointer.save(4, last=True)
    assert read_manifest(tmp_path / "checkpoint" / "step-4").kind == "model_only"

    resumed, step = resume(tmp_path)
    assert step == 2
    assert equal(snapshot(resumed), saved)
    assert "step-4 holds the model only" in caplog.text

    weights = TinyModel(seed=5)
    report = load_model_weights(tmp_path / "checkpoint" / "step-4", weights)
    assert set(report.cast) == set(weights.state_dict())
    expected = {k: v.bfloat16().float() for k, v in run.model.state_dict().items()}
    assert equal(dict(weights.state_dict()), expected)


def test_full_save_takes_the_place_of_a_model_only_one(tmp_path):
    run = Run(tmp_path)
    run.train(2)
    run.checkpointer.save(2, last=True)
    assert resume(tmp_path)[1] is None
    assert run.checkpointer.save(2)
    assert steps(tmp_path) == ["step-2", "step-2.model_only"]
    assert resume(tmp_path)[1] == 2


def test_model_only_never_takes_the_place_of_a_full_one(tmp_path):
    run = Run(tmp_path)
    run.train(2)
    run.checkpointer.save(2)
    assert run.checkpointer.save(2, last=True)  # held already
    assert resume(tmp_path)[1] == 2


def test_last_save_is_full_when_asked(tmp_path):
    run = Run(tmp_path, last_save_model_only=False)
    run.train(3)
    run.checkpointer.save(3, last=True)
    assert resume(tmp_path)[1] == 3


def test_load_step_chooses(tmp_path, caplog):
    run = Run(tmp_path)
    for step in (2, 4):
        run.train(2)
        run.checkpointer.save(step)
    assert resume(tmp_path)[1] == 4
    assert resume(tmp_path, load_step=2)[1] == 2
    assert "later steps (up to step-4) are in" in caplog.text
    with pytest.raises(UserError, match=r"load_step = 3.*finished steps: 2, 4"):
        resume(tmp_path, load_step=3)


def test_load_step_of_a_model_only_checkpoint_loads_weights_alone(tmp_path):
    run = Run(tmp_path)
    run.train(2)
    run.checkpointer.save(2, last=True)
    resumed, step = resume(tmp_path, load_step=2)
    assert step == 0
    assert equal(dict(resumed.model.state_dict()), dict(run.model.state_dict()))
    assert resumed.counter.state["step"] == 0


def test_seed_checkpoint_starts_runs_alike(tmp_path):
    seed = Run(tmp_path, export_dtype="bfloat16")
    seed.checkpointer.save(0, last=True)
    assert not seed.optimizer.state  # saving must not invent optimizer steps
    run, step = resume(tmp_path)
    assert step == 0
    assert equal(dict(run.model.state_dict()), dict(seed.model.state_dict()))


def test_save_before_the_first_optimizer_step_keeps_the_optimizer_fresh(tmp_path):
    run = Run(tmp_path)
    run.checkpointer.save(3, force=True)
    assert not run.optimizer.state
    resumed, _ = resume(tmp_path)
    assert not resumed.optimizer.state
    assert resumed.train(2, seed=3) == run.train(2, seed=3)


def test_heads_that_were_never_stepped_resume_without_state(tmp_path):
    def without_head_1(run):
        for parameter in run.model.mtp.heads["1"].parameters():
            parameter.requires_grad_(False)
        losses = run.train(2)
        for parameter in run.model.mtp.heads["1"].parameters():
            parameter.requires_grad_(True)
        return losses

    run = Run(tmp_path)
    without_head_1(run)
    run.checkpointer.save(2)
    assert len(run.optimizer.state) < len(list(run.model.parameters()))
    resumed, _ = resume(tmp_path)
    assert equal(snapshot(resumed), snapshot(run))
    assert resumed.train(3, seed=3) == run.train(3, seed=3)
    assert equal(snapshot(resumed), snapshot(run))


def test_loading_into_a_run_that_has_trained_discards_its_state(tmp_path):
    run = Run(tmp_path)
    run.train(2)
    run.checkpointer.save(2)
    saved = snapshot(run)
    run.train(1)
    run.model(torch.zeros(1, 2, dtype=torch.long))[0].sum().backward()
    assert run.checkpointer.load() == 2
    assert equal(snapshot(run), saved)
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_wrappers_leave_no_trace_in_names(tmp_path):
    model = TinyModel()
    model.layers["0"] = torch.compile(model.layers["0"], backend="eager")
    wrapper = torch.distributed.algorithms._checkpoint.checkpoint_wrapper.checkpoint_wrapper
    model.layers["1"] = wrapper(model.layers["1"])
    run = Run(tmp_path, model=model)
    run.train(2)
    run.checkpointer.save(2)
    plain, step = resume(tmp_path)
    assert step == 2
    assert equal(plain.optimizer.state_dict(), run.optimizer.state_dict())
    assert plain.train(2, seed=3) == run.train(2, seed=3)


def test_other_optimizer_is_refused_unless_excluded(tmp_path):
    run = Run(tmp_path)
    run.train(2)
    run.checkpointer.save(2)
    other = Run(tmp_path)
    other.checkpointer.optimizer = torch.optim.AdamW(other.model.mtp.parameters())
    with pytest.raises(UserError, match=r"only one of its optimizer .*layers.0.norm.weight"):
        other.checkpointer.load()
    other.checkpointer.optimizer = torch.optim.AdamW(other.model.parameters(), amsgrad=True)
    with pytest.raises(UserError, match=r"max_exp_avg_sq.*optimizer.name"):
        other.checkpointer.load()
    resumed, step = resume(tmp_path, exclude_from_loading=["optimizer", "lr_scheduler"])
    assert step == 2
    assert not resumed.optimizer.state
    assert resumed.schedule.last_epoch == 0
    assert resumed.counter.state == run.counter.state


@pytest.mark.parametrize(
    ("tied", "excluded", "fresh"),
    [
        (False, ["mtp"], ["mtp."]),
        (False, ["layers.0", "output"], ["layers.0.", "output."]),
        (False, ["model"], [""]),
        (True, ["output"], []),  # loaded as tok_embeddings
        (True, ["output", "tok_embeddings"], ["output.", "tok_embeddings."]),
    ],
)
def test_excluded_parameters_begin_without_moments(tmp_path, caplog, tied, excluded, fresh):
    caplog.set_level(logging.INFO)
    run = Run(tmp_path, tied=tied)
    run.train(2)
    run.checkpointer.save(2)
    # Heads of another number are as free as their weights are.
    other = Run(
        tmp_path,
        heads=3 if "mtp" in excluded else 2,
        tied=tied,
        seed=1,
        exclude_from_loading=excluded,
    )
    start = {name: p.detach().clone() for name, p in other.model.named_parameters()}
    assert other.checkpointer.load() == 2
    saved = dict(run.model.named_parameters())
    for name, parameter in other.model.named_parameters():
        anew = name.startswith(tuple(fresh))
        assert torch.equal(parameter, start[name] if anew else saved[name]), name
        state = other.optimizer.state.get(parameter)
        assert equal(state, None if anew else run.optimizer.state[saved[name]]), name
    told = f"as excluded: {', '.join(sorted(excluded))}" + (
        "; the optimizer's state of " if fresh else "\n"
    )
    assert told in caplog.text
    # The first update of Adam without moments is the gradient's sign times the rate.
    other.optimizer.param_groups[0]["weight_decay"] = 0.0
    before = {p: p.detach().clone() for p in other.model.parameters()}
    other.train(1)
    for name, parameter in other.model.named_parameters():
        if name.startswith(tuple(fresh)):
            moved = (parameter - before[parameter]).abs().max().item()
            assert moved == pytest.approx(0.01 / 3, rel=1e-3), name


def test_unknown_exclusion_is_refused(tmp_path):
    run = Run(tmp_path, exclude_from_loading=["optimiser"])
    with pytest.raises(UserError, match=r"exclude_from_loading names 'optimiser', expected one"):
        run.checkpointer.load()  # at the start of a run, not when it is resumed
    run = Run(tmp_path, exclude_from_loading=["optimizer", "mtp", "layers.0"])
    assert run.checkpointer.load() is None
    run.checkpointer.save(2, force=True)
    with pytest.raises(UserError, match=r"exclude_from_loading names 'data_loader', expected one"):
        resume(tmp_path, exclude_from_loading=["data_loader"])


def test_missing_state_is_named(tmp_path):
    run = Run(tmp_path)
    run.checkpointer.save(2, force=True)
    other = Run(tmp_path)
    other.checkpointer.extra["dataloader"] = other.counter
    with pytest.raises(UserError, match="holds no dataloader"):
        other.checkpointer.load()


def test_resume_needs_the_same_dtype_and_heads(tmp_path):
    Run(tmp_path).checkpointer.save(2, force=True)
    with pytest.raises(UserError, match=r"tok_embeddings.weight is torch.float32.*torch.bfloat16"):
        Run(tmp_path, model=TinyModel().bfloat16()).checkpointer.load()
    with pytest.raises(UserError, match=r"lacks 2 \(mtp.heads.2"):
        Run(tmp_path, heads=3).checkpointer.load()
    with pytest.raises(UserError, match=r"holds 2 \(mtp.heads.1"):
        Run(tmp_path, heads=1).checkpointer.load()


def test_state_that_could_not_be_loaded_safely_is_not_saved(tmp_path):
    run = Run(tmp_path)
    run.counter.state["when"] = Path("x")
    with pytest.raises(TypeError, match=r"train_state.when: PosixPath"):
        run.checkpointer.save(2)


def test_initial_load(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    trunk = Run(tmp_path / "a", heads=0)
    trunk.train(2)
    trunk.checkpointer.save(2)
    run = Run(tmp_path / "b", heads=2, seed=1, initial_load_path=str(tmp_path / "a"))
    start = snapshot(run)
    assert run.checkpointer.load() is None
    state = run.model.state_dict()
    for name, value in trunk.model.state_dict().items():
        assert torch.equal(state[name], value)
    heads = {name for name in state if name.startswith("mtp.")}
    assert set(run.checkpointer.load_report.missing) == heads
    assert equal({n: state[n] for n in heads}, {n: start[0][n] for n in heads})
    assert "start as mtp.init says: 4 (mtp.heads.0" in caplog.text
    assert run.counter.state["step"] == 0

    run.train(2)
    run.checkpointer.save(2)
    again = Run(tmp_path / "b", heads=2, initial_load_path=str(tmp_path / "a"))
    assert again.checkpointer.load() == 2
    assert equal(snapshot(again), snapshot(run))
    assert "initial_load_path is ignored: resuming" in caplog.text


def test_initial_load_survives_a_death_before_the_first_save(tmp_path):
    source = Run(tmp_path / "a")
    source.checkpointer.save(0, last=True)
    (tmp_path / "b" / "checkpoint" / "step-2.tmp").mkdir(parents=True)
    run = Run(tmp_path / "b", seed=1, initial_load_path=str(tmp_path / "a"))
    run.checkpointer.load()
    assert equal(dict(run.model.state_dict()), dict(source.model.state_dict()))


def test_initial_load_of_everything(tmp_path):
    run = Run(tmp_path / "a")
    run.train(2)
    run.checkpointer.save(2)
    config = {"initial_load_path": str(tmp_path / "a"), "initial_load_model_only": False}
    other, step = resume(tmp_path / "b", **config)
    assert step == 2
    assert equal(snapshot(other), snapshot(run))
    run.checkpointer.save(3, last=True)
    with pytest.raises(UserError, match=r"step-3: holds the model only; name a full step"):
        resume(tmp_path / "c", **config)


def test_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.train(2)
    run.checkpointer.save(2)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"step-4 needs [\d,]+ bytes, 1,000 are free"):
        run.checkpointer.save(4)
    assert steps(tmp_path) == ["step-2"]


def test_retention(tmp_path):
    run = Run(tmp_path, keep_latest_k=2, last_save_model_only=True)
    (tmp_path / "checkpoint" / "step-1").mkdir(parents=True)  # not finished: not ours to remove
    for step in (2, 4, 6):
        run.checkpointer.save(step)
    assert steps(tmp_path) == ["step-1", "step-4", "step-6"]
    run.checkpointer.save(7, last=True)
    assert steps(tmp_path) == ["step-1", "step-6", "step-7"]
    run.checkpointer.save(8, last=True)
    assert steps(tmp_path) == ["step-1", "step-6", "step-7", "step-8"]  # 6 is the last full one


def test_frozen_trunk_with_an_optimizer_over_the_heads(tmp_path):
    def make(seed):
        run = Run(tmp_path, seed=seed)
        run.optimizer = torch.optim.AdamW(run.model.mtp.parameters(), lr=0.1)
        run.schedule = Schedule(run.optimizer, lambda s: 1 / (1 + s))
        run.checkpointer.optimizer = run.optimizer
        run.checkpointer.extra["lr_scheduler"] = run.schedule
        for name, parameter in run.model.named_parameters():
            parameter.requires_grad_(name.startswith("mtp."))
        return run

    run = make(0)
    run.train(2)
    run.checkpointer.save(2)
    resumed = make(1)
    resumed.checkpointer.load()
    assert equal(snapshot(resumed), snapshot(run))
    assert isinstance(resumed.model.mtp, nn.Module)
