"""An interrupted run that goes on equals the one that was never interrupted, to the bit."""

from __future__ import annotations

import signal
import tempfile
import time

import pytest
import torch

from runs import (
    DEEPSEEK,
    HEAD_BY_HEAD,
    SEQUENTIAL,
    SOURCES,
    a_world,
    config_of,
    interrupt_after,
    same,
    train,
    write_corpus,
)
from spawn import fork_server
from torchtitan_mtp import trainer
from torchtitan_mtp.config import load_toml
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.trainer import Trainer

SAVES = {
    "checkpoint.enable": True,
    "checkpoint.interval": 3,
    "checkpoint.last_save_model_only": False,
}


@pytest.mark.parametrize(
    ("family", "source"),
    [
        *[pytest.param(HEAD_BY_HEAD, source, id=f"parallel-{source}") for source in SOURCES],
        pytest.param(SEQUENTIAL, SOURCES[0], id=f"sequential-{SOURCES[0]}"),
        *[  # where a source goes on is not the heads' affair
            pytest.param(SEQUENTIAL, s, marks=pytest.mark.exhaustive, id=f"sequential-{s}")
            for s in SOURCES[1:]
        ],
    ],
)
def test_three_and_three_steps_are_six(family, source, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # of decompressed contents
    data = write_corpus(
        tmp_path, source, count=5
    )  # few lanes: their windows go on within documents
    whole = train(config_of(tmp_path / "whole", data, family))
    config = config_of(tmp_path / "parts", data, family, SAVES)
    first = train(config, interrupt_after(3))
    second = train(config_of(tmp_path / "parts", data, family, SAVES))
    assert (len(first.losses), second.start, len(second.losses)) == (3, 3, 3)
    assert first.logged[-1]["n_tokens_seen"] * 2 == second.logged[-1]["n_tokens_seen"]
    for key in ("step", "head_losses", "grad_norm", "lr", "n_tokens_seen"):
        parts = [step[key] for step in first.logged + second.logged]
        assert parts == [step[key] for step in whole.logged], key
    assert same(second.weights, whole.weights)
    # The steps did something: losses differ from step to step, so equality means the same data.
    assert len({loss[0] for loss in whole.losses}) == 6


def test_validation_costs_no_step_and_moves_nothing(tmp_path, monkeypatch):
    """What was trained is saved before it is validated, experts' counts without validation's."""
    keys = {
        **DEEPSEEK,
        "validation.enable": True,
        "validation.freq": 3,
        "validation.steps": 2,
        "model.args.norm_eps": 1e-6,
    }
    whole = train(config_of(tmp_path / "whole", keys))
    in_hf = {"checkpoint.last_save_in_hf": True}
    for step in (3, 6):  # one within the run, and the last

        def out_of_memory(trainer, compare=False, step=step):
            assert trainer.state.step < step, "out of memory"

        folder = tmp_path / f"stops-{step}"
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "evaluate", out_of_memory)
            with pytest.raises(AssertionError, match="out of memory"):
                train(config_of(folder, keys, SAVES, in_hf))
        assert (folder / "run" / "checkpoint" / "step-6.hf").exists() == (step == 6)
        second = train(config_of(folder, keys, SAVES))
        assert second.start == step and second.losses == whole.losses[step:]
        assert same(second.weights, whole.weights)


def test_the_present_configuration_decides_the_rate(tmp_path, caplog):
    """TorchTitan's rule by hand: warmup over 2 of 12 steps, then a line that aims at step 13."""
    caplog.set_level("INFO")
    last = {**SAVES, "checkpoint.interval": 100}
    train(config_of(tmp_path, last, {"optimizer.lr": 0.01}))
    longer = {"training.steps": 12, "optimizer.lr": 0.005, "optimizer.weight_decay": 0.0}
    second = train(config_of(tmp_path, last, longer))
    expected = [0.005 * (1 - (step - 3) / 10) for step in range(7, 13)]
    assert [step["lr"] for step in second.logged] == pytest.approx(expected, rel=1e-12)
    line = next(r.getMessage() for r in caplog.records if "changed since" in r.getMessage())
    assert sorted(line.partition(" was saved: ")[2].split(", ")) == [
        "optimizer.lr 0.01 -> 0.005",
        "optimizer.weight_decay 0.1 -> 0.0",
        "training.steps 6 -> 12",
    ]
    # And of everything else that changes what is computed.
    caplog.clear()
    others = {
        "training.max_norm": 0.5,
        "training.skip_nonfinite": 2,
        "loss.z_loss": 1e-4,
        "loss.label_smoothing": 0.1,
        "mtp.loss_weights": [0.5, 0.25],
        "mtp.loss_scale_final": 0.5,  # refused of a new run
        "activation_checkpoint.mode": "full",
    }
    train(config_of(tmp_path, last, longer, others, {"training.steps": 13}))
    (line,) = (r.getMessage() for r in caplog.records if "changed since" in r.getMessage())
    told = line.partition(" was saved: ")[2]
    for key, value in others.items():
        assert (key in told and f"-> {value}" in told) == (key != "activation_checkpoint.mode")
    with pytest.raises(UserError, match=r'loss.softcap = "none", this run has 30.0; set it as it'):
        train(config_of(tmp_path, last, {"loss.softcap": 30.0}))


def test_a_seed_is_not_made_of_trained_weights(tmp_path):
    train(config_of(tmp_path, SAVES))
    with pytest.raises(UserError, match=r"has trained weights already \(step-6\)"):
        train(config_of(tmp_path, SAVES, {"checkpoint.create_seed_checkpoint": True}))
    assert not (tmp_path / "run" / "checkpoint" / "step-0").exists()


def test_experts_biases_resume_too(tmp_path):
    keys = {**DEEPSEEK, "model.args.moe.aux_loss_coeff": 0.01}
    whole = train(config_of(tmp_path / "whole", keys))
    train(config_of(tmp_path / "parts", keys, SAVES), interrupt_after(3))
    second = train(config_of(tmp_path / "parts", keys, SAVES))
    assert second.losses == whole.losses[3:]
    assert same(second.weights, whole.weights)
    moved = [w for name, w in whole.weights.items() if name.endswith(".moe.expert_bias")]
    assert len(moved) == 3 and all(bias.abs().max() > 1e-3 for bias in moved)
    blocks = ("layers.1", "mtp.heads.0", "mtp.heads.1")
    assert {tag.rsplit("/", 1)[0] for tag in whole.logged[-1]["extra_metrics"]} == {
        f"moe/{block}" for block in blocks
    }


def test_background_saves_resume_alike(tmp_path):
    whole = train(config_of(tmp_path))
    for mode in ("async", "async_with_pinned_mem"):
        keys = {**SAVES, "checkpoint.async_mode": mode}
        train(config_of(tmp_path / mode, keys), interrupt_after(3))
        second = train(config_of(tmp_path / mode, keys))
        assert second.start == 3
        assert same(second.weights, whole.weights)


def test_accumulation_resumes_between_steps(tmp_path):
    keys = {"training.global_batch_size": 6, "training.local_batch_size": 2}
    whole = train(config_of(tmp_path / "whole", keys))
    train(config_of(tmp_path / "parts", keys, SAVES), interrupt_after(3))
    second = train(config_of(tmp_path / "parts", keys, SAVES))
    assert second.losses == whole.losses[3:]
    assert same(second.weights, whole.weights)


def test_a_drawn_seed_is_kept(tmp_path):
    unsaid = {"training.seed": None}
    first = train(config_of(tmp_path / "parts", SAVES, unsaid), interrupt_after(3))
    written = tmp_path / "parts" / "run" / "config.toml"
    drawn = load_toml(written).training.seed
    config = config_of(tmp_path / "parts", SAVES, unsaid)
    second = train(config)
    assert second.start == 3 and drawn == load_toml(written).training.seed is not None
    assert config.training.seed is None  # a trainer leaves its configuration as it was
    whole = train(config_of(tmp_path / "whole", {"training.seed": drawn}))
    assert first.losses + second.losses == whole.losses
    assert same(second.weights, whole.weights)
    another = train(config_of(tmp_path / "another", unsaid, {"training.steps": 1}))
    assert another.losses != whole.losses[:1]


def test_the_precision_that_a_run_began_with_is_kept(tmp_path, monkeypatch):
    """What "auto" measures may come out otherwise, beside other programs or on another machine."""
    auto = {"training.mixed_precision_param": "auto"}
    monkeypatch.setattr(trainer, "resolve_auto_dtype", lambda device: torch.bfloat16)
    first = train(config_of(tmp_path / "parts", SAVES, auto), interrupt_after(3))
    written = load_toml(tmp_path / "parts" / "run" / "config.toml")
    assert written.training.mixed_precision_param == "bfloat16"
    monkeypatch.setattr(trainer, "resolve_auto_dtype", lambda device: torch.float32)
    second = train(config_of(tmp_path / "parts", SAVES, auto))
    whole = train(config_of(tmp_path, {"training.mixed_precision_param": "bfloat16"}))
    assert first.losses + second.losses == whole.losses


def test_a_finished_run_is_not_trained_again(tmp_path, caplog):
    first = train(config_of(tmp_path, SAVES))
    again = train(config_of(tmp_path, SAVES))
    assert (again.start, again.losses) == (6, [])
    assert same(again.weights, first.weights)


TWELVE = {"training.steps": 12}


def train_apart(folder):
    with a_world():
        train(config_of(folder, TWELVE, SAVES, {"checkpoint.interval": 1}))


def test_a_killed_process_goes_on_from_its_last_whole_checkpoint(tmp_path):
    whole = train(config_of(tmp_path / "whole", TWELVE))
    process = fork_server().Process(target=train_apart, args=(tmp_path,), daemon=True)
    process.start()
    folder = tmp_path / "run" / "checkpoint"
    deadline = time.monotonic() + 120
    while not (folder / "step-4").exists():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    second = train(config_of(tmp_path, TWELVE, SAVES, {"checkpoint.interval": 100}))
    assert 4 <= second.start < 12
    assert second.losses == whole.losses[second.start :]
    assert same(second.weights, whole.weights)
