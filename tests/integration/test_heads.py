"""What the [mtp] keys do to a whole run: frozen trunks, where heads start, schedules, sizes."""

from __future__ import annotations

import json
import math

import pytest
import torch

from runs import (
    DEEPSEEK,
    HEAD_BY_HEAD,
    JOINT,
    SEQUENTIAL,
    a_world,
    config_of,
    interrupt_after,
    largest_difference,
    same,
    train,
    weights_of,
)
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.flavors import model_args
from torchtitan_mtp.models.transformer import build_model
from torchtitan_mtp.trainer import Trainer

FAMILIES = {"joint": JOINT, "head_by_head": HEAD_BY_HEAD, "chain": SEQUENTIAL}
family = pytest.mark.parametrize("keys", FAMILIES.values(), ids=FAMILIES.keys())
resumed = pytest.mark.parametrize(  # checkpoints know nothing of the engine
    "keys",
    [pytest.param(JOINT, marks=pytest.mark.exhaustive), HEAD_BY_HEAD, SEQUENTIAL],
    ids=FAMILIES.keys(),
)
OFF = {"model.converters": [], "mtp.num_future_tokens": 1}
SAVES = {"checkpoint.enable": True, "checkpoint.interval": 100}
TWO = {"training.steps": 2}
FREE = {"training.max_norm": math.inf, "training.steps": 3}
NO_SCALE = {"mtp.loss_scale": 0.0}


def starting_weights(config):
    """The weights of a run before its first step."""
    seen = {}

    def look(trainer: Trainer) -> None:
        for name, param in trainer.model.named_parameters():
            seen[name] = param.full_tensor().detach().clone()
        trainer.state.step = config.training.steps

    train(config, look)
    return seen


@pytest.fixture(scope="module")
def trunk_run(tmp_path_factory):
    """A plain model, trained two steps and saved."""
    folder = tmp_path_factory.mktemp("trunk")
    with a_world():
        return train(config_of(folder, TWO, OFF, SAVES)), folder / "run"


@pytest.fixture(scope="module")
def without_heads(tmp_path_factory):
    """A plain model's run, without clipping, whose norm would be over everything."""
    with a_world():
        return train(config_of(tmp_path_factory.mktemp("without"), OFF, FREE))


@pytest.fixture(scope="module", params=[JOINT, SEQUENTIAL], ids=["parallel", "chain"])
def saved_run(request, tmp_path_factory):
    """A family's keys, a run of two steps with n = 3, and its folder."""
    folder = tmp_path_factory.mktemp("saved")
    with a_world():
        return request.param, train(config_of(folder, TWO, request.param, SAVES)), folder / "run"


@family
def test_training_the_heads_leaves_the_trunk_alone(keys, tmp_path):
    changes = {"mtp.train": "heads", "training.steps": 20, "optimizer.lr": 1e-2}
    before = starting_weights(config_of(tmp_path / "a", keys))
    run = train(config_of(tmp_path / "b", keys, changes))
    assert same(run.trunk, {k: v for k, v in before.items() if not k.startswith("mtp.")})
    for name, weight in run.weights.items():
        assert torch.equal(weight, before[name]) == (not name.startswith("mtp.")), name
    for head in (1, 2):
        first, last = (run.losses[i][head] for i in (0, -1))
        assert last < first - 0.2, f"head {head + 1}: {first} -> {last}"
    assert run.logged[0]["grad_norm"] > 0


@resumed
def test_frozen_trunk_resumes(keys, tmp_path):
    changes = {"mtp.train": "heads", "training.steps": 4}
    saves = {**SAVES, "checkpoint.interval": 2, "checkpoint.last_save_model_only": False}
    whole = train(config_of(tmp_path / "a", keys, changes))
    train(config_of(tmp_path / "b", keys, changes, saves), interrupt_after(2))
    second = train(config_of(tmp_path / "b", keys, changes, saves))
    assert second.start == 2 and same(second.weights, whole.weights)


@family
def test_detached_heads_train_the_trunk_as_without_them(keys, without_heads, tmp_path):
    """But for the order of one engine's sums."""
    run = train(config_of(tmp_path, keys, FREE, {"mtp.detach_trunk": True}))
    difference = largest_difference(run.trunk, without_heads.weights)
    assert difference <= (1e-6 if keys == HEAD_BY_HEAD else 0)


@family
def test_new_heads_start_as_the_last_layer_of_the_loaded_trunk(keys, trunk_run, tmp_path):
    trunk, folder = trunk_run
    load = {"checkpoint.enable": True, "checkpoint.initial_load_path": str(folder)}
    copied = starting_weights(
        config_of(tmp_path / "a", keys, load, {"mtp.init": "copy_last_layer", "training.seed": 7})
    )
    own = starting_weights(config_of(tmp_path / "b", keys, load, {"training.seed": 7}))
    assert same({k: v for k, v in copied.items() if not k.startswith("mtp.")}, trunk.weights)
    assert same({k: v for k, v in own.items() if not k.startswith("mtp.")}, trunk.weights)
    last = "layers.1."
    block = "block." if keys == SEQUENTIAL else ""
    for head in (0, 1):
        prefix = f"mtp.heads.{head}."
        for name, weight in trunk.weights.items():
            if name.startswith(last):
                counterpart = prefix + block + name.removeprefix(last)
                assert torch.equal(copied[counterpart], weight), counterpart
                if weight.ndim > 1:
                    assert not torch.equal(own[counterpart], weight), counterpart
        if keys == SEQUENTIAL:
            assert torch.equal(copied[prefix + "norm.weight"], trunk.weights["norm.weight"])
            for name in ("enorm.weight", "hnorm.weight", "eh_proj.weight"):
                assert torch.equal(copied[prefix + name], own[prefix + name]), name


def test_copying_without_a_checkpoint_copies_the_random_layer(tmp_path):
    start = starting_weights(config_of(tmp_path, {"mtp.init": "copy_last_layer"}))
    for name, weight in start.items():
        if name.startswith("layers.1."):
            assert torch.equal(start[name.replace("layers.1.", "mtp.heads.1.")], weight), name


def test_a_resumed_run_keeps_its_trained_heads(tmp_path):
    keys = {"mtp.init": "copy_last_layer", "training.steps": 4}
    saves = {**SAVES, "checkpoint.interval": 2, "checkpoint.last_save_model_only": False}
    whole = train(config_of(tmp_path / "a", keys))
    train(config_of(tmp_path / "b", keys, saves), interrupt_after(2))
    second = train(config_of(tmp_path / "b", keys, saves))
    assert second.start == 2 and same(second.weights, whole.weights)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_heads_load_into_models_with_fewer_or_more(saved_run, n, tmp_path):
    """Saved with n = 3, loaded with n: the common heads load, others start as `init` says."""
    keys, saved, folder = saved_run
    load = {
        "checkpoint.enable": True,
        "checkpoint.initial_load_path": str(folder),
        "mtp.num_future_tokens": n,
        "mtp.init": "copy_last_layer",
    }
    start = starting_weights(config_of(tmp_path, keys, load))
    heads = {name.split(".")[2] for name in start if name.startswith("mtp.")}
    assert heads == {str(i) for i in range(n - 1)}
    for name, weight in start.items():
        if name in saved.weights:
            assert torch.equal(weight, saved.weights[name]), name
    if n == 4:
        block = "block." if keys == SEQUENTIAL else ""
        new = start[f"mtp.heads.2.{block}attention.wq.weight"]
        assert torch.equal(new, saved.weights["layers.1.attention.wq.weight"])


def test_a_model_with_heads_loads_as_a_plain_one(saved_run, tmp_path):
    _, saved, folder = saved_run
    load = {"checkpoint.enable": True, "checkpoint.initial_load_path": str(folder)}
    assert same(starting_weights(config_of(tmp_path, OFF, load)), saved.trunk)


def test_modules_keep_to_the_state_that_they_were_trained_on(tmp_path):
    """No tensor says which state it is; the checkpoint's record does."""
    raw = {**SEQUENTIAL, "mtp.trunk_state": "raw"}
    saves = {**SAVES, "checkpoint.last_save_model_only": False}
    saved = train(config_of(tmp_path / "a", TWO, raw, saves))
    with pytest.raises(UserError, match=r"mtp\.trunk_state = \"raw\", this run has \"normalized\""):
        train(config_of(tmp_path / "a", SEQUENTIAL, saves))  # resumes
    load = {"checkpoint.enable": True, "checkpoint.initial_load_path": str(tmp_path / "a" / "run")}
    with pytest.raises(UserError, match=r"this run has \"normalized\""):
        train(config_of(tmp_path / "b", SEQUENTIAL, load))
    assert same(starting_weights(config_of(tmp_path / "c", raw, load)), saved.weights)
    trunk = {**load, "checkpoint.exclude_from_loading": ["mtp"]}
    start = starting_weights(config_of(tmp_path / "d", SEQUENTIAL, trunk))
    assert same({k: w for k, w in start.items() if not k.startswith("mtp.")}, saved.trunk)


def test_shared_weights_are_one_module(tmp_path):
    """A module applied twice: half the parameters of two, and it trains and resumes."""
    keys = {**SEQUENTIAL, "mtp.share_weights": True, "training.steps": 4}
    saves = {**SAVES, "checkpoint.interval": 2, "checkpoint.last_save_model_only": False}
    whole = train(config_of(tmp_path / "a", keys))
    assert {name.split(".")[2] for name in whole.weights if name.startswith("mtp.")} == {"0"}
    assert len(whole.losses[0]) == 3
    train(config_of(tmp_path / "b", keys, saves), interrupt_after(2))
    assert same(train(config_of(tmp_path / "b", keys, saves)).weights, whole.weights)


def test_matched_parameters_are_the_plain_models(tmp_path):
    three = {"model.args.n_layers": 3}
    plain = starting_weights(config_of(tmp_path / "a", three, OFF))
    matched = starting_weights(config_of(tmp_path / "b", three, {"mtp.match_parameters": True}))
    assert sum(w.numel() for w in matched.values()) == sum(w.numel() for w in plain.values())
    assert {name.split(".")[1] for name in matched if name.startswith("layers.")} == {"0"}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"mtp.curriculum": "forward"}, [(1, 0, 0)] * 2 + [(1, 1, 0)] * 2 + [(1, 1, 1)] * 2),
        ({"mtp.curriculum": "reverse"}, [(1, 1, 1)] * 2 + [(1, 1, 0)] * 2 + [(1, 0, 0)] * 2),
        (
            {"mtp.curriculum": "forward", "mtp.curriculum_fraction": 0.5},
            [(1, 0, 0), (1, 1, 0)] + [(1, 1, 1)] * 4,
        ),
        (
            {"mtp.loss_scale_schedule": "step", "mtp.loss_scale": 0.3, "mtp.loss_weights": [1, 2]},
            [(1, 0.3, 0.6)] * 4 + [(1, 0.1, 0.2)] * 2,
        ),
    ],
)
def test_schedules_reach_the_loss(keys, expected, tmp_path):
    """The weights that are logged are those that the total was made with."""
    run = train(config_of(tmp_path, keys))
    for step, weights in zip(run.logged, expected, strict=True):
        assert step["head_scales"] == pytest.approx(weights)
        total = sum(w * loss for w, loss in zip(weights, step["head_losses"], strict=True))
        assert step["global_total_loss"] == pytest.approx(total, rel=1e-6)


FORWARD = {"mtp.curriculum": "forward"}  # of 6 steps two with each number of heads
REST = {  # keys -> the steps in which modules 0 and 1 are under a loss with a weight
    "forward": (FORWARD, [3, 4, 5, 6], [5, 6]),
    "reverse": ({"mtp.curriculum": "reverse", **HEAD_BY_HEAD}, [1, 2, 3, 4], [1, 2]),
    "no weight": ({"mtp.loss_weights": [0.0, 1.0]}, [], [1, 2, 3, 4, 5, 6]),
    "no scale": ({"mtp.loss_scale": 0.0, **HEAD_BY_HEAD}, [], []),
    "chain, forward": ({**FORWARD, **SEQUENTIAL}, [3, 4, 5, 6], [5, 6]),
    # Head 3 reads what module 0 made.
    "chain, no weight": ({"mtp.loss_weights": [0.0, 1.0], **SEQUENTIAL}, *[[1, 2, 3, 4, 5, 6]] * 2),
    "chain, shared": ({**FORWARD, **SEQUENTIAL, "mtp.share_weights": True}, [3, 4, 5, 6], None),
    "experts, reverse": ({"mtp.curriculum": "reverse", **DEEPSEEK}, [1, 2, 3, 4], [1, 2]),
    "experts, no scale": ({"mtp.loss_scale": 0.0, **DEEPSEEK}, [], []),
    # <bos> a <eos>: head 3 would have to look over the end.
    "short documents": (HEAD_BY_HEAD, [1, 2, 3, 4, 5, 6], []),
    "experts, short documents": (DEEPSEEK, [1, 2, 3, 4, 5, 6], []),
}


@pytest.mark.parametrize("case", REST)
def test_what_no_weighted_loss_reaches_does_not_change(case, tmp_path):
    """No decay, no moments, no step count, no expert's bias; and all the others do."""
    keys, *expected = REST[case]
    if "short" in case:
        lines = [json.dumps({"text": letter}) for letter in "abcd" * 40]
        (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    moved: dict[str, list[int]] = {}
    counts: dict[str, int] = {}

    def prepare(trainer: Trainer) -> None:
        train_step = trainer.train_step

        weights = weights_of(trainer)

        def step_and_look() -> None:
            train_step()
            for name, weight in weights_of(trainer).items():
                steps = moved.setdefault(name, [])
                if not torch.equal(weight, weights[name]):
                    steps.append(trainer.state.step)
                weights[name] = weight
            for name, parameter in trainer.model.named_parameters():
                counts[name] = int(trainer.optimizer.state.get(parameter, {}).get("step", 0))

        trainer.train_step = step_and_look  # type: ignore[method-assign]

    train(config_of(tmp_path, keys, {"optimizer.weight_decay": 1.0}), prepare)
    modules = {name.split(".")[2] for name in moved if name.startswith("mtp.")}
    assert modules == {str(j) for j, steps in enumerate(expected) if steps is not None}
    for name, steps in moved.items():
        at = expected[int(name.split(".")[2])] if name.startswith("mtp.") else [1, 2, 3, 4, 5, 6]
        if name.endswith(".expert_bias"):
            assert set(steps) <= set(at) and bool(steps) == bool(at), name
        else:
            assert steps == at and counts[name] == len(at), name


@family
def test_the_trunk_of_heads_without_weight_trains_as_without_them(keys, without_heads, tmp_path):
    run = train(config_of(tmp_path, keys, FREE, NO_SCALE))
    assert same(run.trunk, without_heads.weights)


@resumed
def test_heads_at_rest_resume(keys, tmp_path):
    """From a step at which they were in no update yet."""
    saves = {**SAVES, "checkpoint.interval": 3, "checkpoint.last_save_model_only": False}
    whole = train(config_of(tmp_path / "a", keys, FORWARD))
    train(config_of(tmp_path / "b", keys, FORWARD, saves), interrupt_after(3))
    second = train(config_of(tmp_path / "b", keys, FORWARD, saves))
    assert second.start == 3 and same(second.weights, whole.weights)


@pytest.mark.parametrize("keys", [JOINT, SEQUENTIAL], ids=["parallel", "chain"])
def test_parameters_that_the_log_counts(keys, tmp_path):
    """Against the arithmetic of the shapes."""
    start = starting_weights(config_of(tmp_path, keys))
    args = model_args("llama3", "tiny", tokenizer_vocab=258)
    trunk = sum(p.numel() for p in build_model(args).parameters())
    dim, kv, ffn = 32, 16, 96
    block = 2 * dim * dim + 2 * dim * kv + 3 * dim * ffn + 2 * dim
    head = block if keys == JOINT else block + 2 * dim * dim + 3 * dim
    assert trunk == 2 * 320 * dim + 2 * block + dim
    assert sum(w.numel() for w in start.values()) == trunk + 2 * head
