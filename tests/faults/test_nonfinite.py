"""Numbers that are not finite stop the run before they reach the weights, or are skipped."""

from __future__ import annotations

import logging

import pytest
import torch
from poison import leave_out_updates, poison
from torch.utils._python_dispatch import TorchDispatchMode

from runs import HEAD_BY_HEAD, SEQUENTIAL, Interrupted, config_of, finish, same, train, weights_of
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.monitoring.losses import LossSpikes
from torchtitan_mtp.trainer import Trainer

SAVES = {"checkpoint.enable": True, "checkpoint.interval": 1}
SILENT = {"metrics.log_freq": 100}
IMPLEMENTATIONS = ["fused", "foreach", "for-loop"]


def stopped(folder, *keys) -> tuple[str, dict[str, torch.Tensor]]:
    """What the run that meets a bad batch in step 3 says, and its weights then."""
    trainer = Trainer(config_of(folder, *keys))
    try:
        poison(trainer, {3})
        with pytest.raises(UserError) as error:
            trainer.train()
        assert "\n" not in str(error.value)
        return str(error.value), weights_of(trainer)
    finally:
        finish(trainer)


@pytest.mark.parametrize(
    ("implementation", "family"),
    [("fused", HEAD_BY_HEAD), ("fused", SEQUENTIAL), ("for-loop", HEAD_BY_HEAD)],
)
def test_stops_before_the_update_and_names_the_place(implementation, family, tmp_path):
    keys = {"optimizer.implementation": implementation}
    message, weights = stopped(tmp_path / "bad", keys, family, SILENT)
    assert message.startswith("step 3: loss or gradient not finite (norm nan): it began on rank 0")
    assert "rank 0 with head 1, micro-batch 1, sequence 2: hidden state not finite; st" in message
    assert "training.skip_nonfinite" in message and "optimizer.lr" in message
    good = train(config_of(tmp_path / "good", keys, family), stop_after_2)
    assert same(weights, good.weights)


def stop_after_2(trainer: Trainer) -> None:
    step = trainer.train_step

    def step_and_stop() -> None:
        step()
        if trainer.state.step == 2:
            raise Interrupted

    trainer.train_step = step_and_stop


@pytest.mark.parametrize("log", [1, 100])
def test_nothing_of_it_is_saved(log, tmp_path):
    stopped(tmp_path, SAVES, {"metrics.log_freq": log})
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoint").glob("step-*")) == [
        "step-1",
        "step-2",
    ]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_allowed_skips_leave_the_update_out_and_are_counted(implementation, tmp_path, caplog):
    """Equal, to the bit, to a run whose optimizer is not called at these steps."""
    keys = {"optimizer.implementation": implementation, "training.skip_nonfinite": 2, **SILENT}
    bad = {2, 3, 5}
    expected = train(config_of(tmp_path / "a", keys), lambda t: leave_out_updates(t, bad))
    logging.getLogger("torchtitan_mtp").propagate = True
    seen = []

    def prepare(trainer: Trainer) -> None:
        poison(trainer, bad)
        seen.append(trainer.state)

    found = train(config_of(tmp_path / "b", keys), prepare)
    assert same(found.weights, expected.weights)
    assert all(weight.isfinite().all() for weight in found.weights.values())
    assert seen[0].skipped == 3 and found.logged[-1]["extra_metrics"] == {"skipped_steps": 3}
    assert "step 3: " in caplog.text and "2 in a row, 2 in all" in caplog.text
    assert "1 in a row, 3 in all" in caplog.text


def test_more_in_a_row_than_allowed_stop_the_run(tmp_path):
    trainer = Trainer(config_of(tmp_path, {"training.skip_nonfinite": 1}, SILENT))
    poison(trainer, {2, 4, 5})
    with pytest.raises(UserError, match=r"^step 5: "):
        trainer.train()
    finish(trainer)


def test_skipped_steps_are_counted_over_resumes(tmp_path):
    keys = {**SAVES, "training.skip_nonfinite": 1, "checkpoint.last_save_model_only": False}
    train(config_of(tmp_path, keys, {"training.steps": 3}), lambda t: poison(t, {2}))
    trainer = Trainer(config_of(tmp_path, keys))
    assert (trainer.state.step, trainer.state.skipped) == (3, 1)
    finish(trainer)


def test_weights_that_are_bad_already_are_named(tmp_path):
    trainer = Trainer(config_of(tmp_path))
    with torch.no_grad():
        trainer.model.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match=r"; norm\.weight itself is not finite; stopped"):
        trainer.train()
    finish(trainer)


def test_a_gradient_that_alone_is_not_finite(tmp_path):
    trainer = Trainer(config_of(tmp_path))
    engine = trainer.pieces.engine

    def overflow(*args):
        out = engine(*args)
        trainer.model.norm.weight.grad.to_local()[3] = torch.inf
        return out

    trainer.pieces.engine = overflow
    with pytest.raises(UserError, match="all losses are finite when computed anew, so it was the"):
        trainer.train()
    finish(trainer)


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device: values of tensors read into Python."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.is_nonzero.default,
            torch.ops.aten.equal.default,
        ):
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_step_that_logs_nothing_reads_nothing_on_the_host(tmp_path):
    keys = {"optimizer.implementation": "fused", **SILENT, **HEAD_BY_HEAD}
    trainer = Trainer(config_of(tmp_path, keys))
    trainer.train_step()  # the first is logged
    with HostReads() as host:
        trainer.train_step()
        trainer.train_step()
    assert host.count == 0
    with HostReads() as host:
        trainer.grad_norm.item()
    assert host.count == 1
    finish(trainer)


def test_loss_spikes(caplog):
    logging.getLogger("torchtitan_mtp").propagate = True
    spikes = LossSpikes()
    for step in range(40):  # a loss that falls fast is no spike, nor is noise
        assert not spikes.check(step, [10 - step / 8 + 0.02 * (-1) ** step, 11.0], 1.0)
    assert not spikes.check(40, [float("nan"), 1.0], 1.0)
    assert not spikes.check(41, [5.2, 11.0], 1.0)
    assert spikes.check(42, [26.0, 12.0], 30.0)
    assert "step 42: loss spike against the median of the last 32 logged" in caplog.text
    assert "head 2 12.000 (+1.000)" in caplog.text
    assert not spikes.check(43, [5.0, 11.0], 1.0)
