"""Settings that must not change what is learned: the same losses and weights as a plain run."""

from __future__ import annotations

import math

import pytest
import torch

from runs import (
    DEEPSEEK,
    HEAD_BY_HEAD,
    JOINT,
    SEQUENTIAL,
    Run,
    config_of,
    largest_difference,
    same,
    train,
)

THREE = {"training.steps": 3}
FAMILIES = {
    "joint": JOINT,
    "head_by_head": HEAD_BY_HEAD,
    "chain": SEQUENTIAL,
    "experts": {**DEEPSEEK, "model.args.moe.aux_loss_coeff": 0.01},
    "experts_head_by_head": {**HEAD_BY_HEAD, "model.name": "deepseek_v3"},
}
family = pytest.mark.parametrize("keys", FAMILIES.values(), ids=FAMILIES.keys())


def crossed(options: dict[str, str]) -> pytest.MarkDecorator:
    """Every option with the families that stand beside it, and in the exhaustive tests with all."""
    cases = []
    for name, wanted in options.items():
        for family, keys in FAMILIES.items():
            marks = [] if family in wanted.split() else [pytest.mark.exhaustive]
            cases.append(pytest.param(keys, name, marks=marks, id=f"{family}-{name}"))
    return pytest.mark.parametrize(("keys", "name"), cases)


@pytest.fixture(scope="module")
def references() -> dict[str, Run]:
    return {}


@pytest.fixture
def made(references, tmp_path):
    """The run of some keys, made once."""

    def run(keys: dict[str, object]) -> Run:
        key = str(sorted(keys.items()))
        if key not in references:
            references[key] = train(config_of(tmp_path / "made", keys))
        return references[key]

    return run


@pytest.fixture
def plain(made):
    """The run of a family without further options."""
    return lambda keys: made(THREE | keys)


@pytest.mark.parametrize("packed", ["causal", "block_causal"])
def test_one_future_token_is_plain_training(packed, tmp_path):
    """The converter with n = 1, either family's keys, and no converter at all."""
    keys = {"model.attn_mask_type": packed, "training.steps": 4}
    off = {"model.converters": [], "mtp.num_future_tokens": 1}
    without = train(config_of(tmp_path / "a", keys, off))
    assert set(without.weights) == set(without.trunk)
    for i, heads in enumerate((JOINT, HEAD_BY_HEAD, SEQUENTIAL)):
        run = train(config_of(tmp_path / str(i), keys, heads, {"mtp.num_future_tokens": 1}))
        assert run.losses == without.losses
        assert [s["grad_norm"] for s in run.logged] == [s["grad_norm"] for s in without.logged]
        assert same(run.weights, without.weights)


@family
def test_scale_zero_trains_the_trunk_as_without_heads(keys, made, tmp_path):
    off = {key: value for key, value in keys.items() if key.startswith("model.")}
    off |= {"model.converters": [], "mtp.num_future_tokens": 1}
    three = THREE | {"training.max_norm": math.inf}  # a norm over more zeros is rounded otherwise
    without = made(three | off)
    zero = train(config_of(tmp_path, three, keys, {"mtp.loss_scale": 0.0}))
    assert [heads[0] for heads in zero.losses] == [heads[0] for heads in without.losses]
    assert same(zero.trunk, without.weights)
    # The other heads do count where the scale is not zero.
    assert not same(made(three | keys).trunk, without.weights)


def test_engines_train_alike(plain):
    joint, head_by_head = plain(JOINT), plain(HEAD_BY_HEAD)
    assert largest_difference(joint.weights, head_by_head.weights) < 2e-5
    torch.testing.assert_close(joint.losses, head_by_head.losses, rtol=1e-5, atol=0)


@crossed({"1": "chain", "2": " ".join(FAMILIES), "3": "joint experts"})
def test_accumulation_is_a_larger_batch(keys, name, made, tmp_path):
    """The windows of a step are the same, however they are cut into micro-batches."""
    whole = {"training.local_batch_size": 6, "training.steps": 3}
    parts = {"training.local_batch_size": int(name), "training.global_batch_size": 6}
    expected = made(whole | keys)
    found = train(config_of(tmp_path, THREE, parts, keys))
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-5, atol=0)
    for key in ("global_total_loss", "grad_norm"):
        a, b = ([step[key] for step in run.logged] for run in (found, expected))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
    assert largest_difference(found.weights, expected.weights) < 2e-5


# What a run may differ by: nothing where the same operations run in the same order.
SAME_TO_THE_BIT = {
    "ac selective op": {
        "activation_checkpoint.mode": "selective",
        "activation_checkpoint.selective_ac_option": "op",
    },
    "ac selective 2": {
        "activation_checkpoint.mode": "selective",
        "activation_checkpoint.selective_ac_option": "2",
    },
    "ac full": {"activation_checkpoint.mode": "full"},
    "ac full, early stop": {
        "activation_checkpoint.mode": "full",
        "activation_checkpoint.early_stop": True,
    },
    "cpu offload": {"training.enable_cpu_offload": True},
    "deterministic": {"training.deterministic": True},
    "resharded": {"parallelism.fsdp_reshard_after_forward": "always"},
    "not resharded": {"parallelism.fsdp_reshard_after_forward": "never"},
    "gc every step": {"training.gc_freq": 1},
    "profiling": {
        "profiling.enable_profiling": True,
        "profiling.profile_freq": 3,
        "profiling.profiler_warmup": 1,
    },
}


@crossed(
    {
        # What recomputes, moves or frees weights: each engine and a chain, one of them of experts.
        "ac selective op": "joint experts",
        "ac selective 2": "head_by_head chain experts_head_by_head",
        "ac full": "head_by_head chain experts",
        "ac full, early stop": "joint chain",
        "cpu offload": "joint experts",
        "resharded": "joint chain experts_head_by_head",
        "not resharded": "head_by_head chain",
        # These know nothing of heads.
        "deterministic": "experts",
        "gc every step": "chain",
        "profiling": "joint",
    }
)
def test_the_same_to_the_bit(keys, name, plain, tmp_path):
    if name == "cpu offload" and torch.cuda.is_available():
        pytest.skip("weights that start on the CPU come from other random numbers than a GPU's")
    run = train(config_of(tmp_path, THREE, keys, SAME_TO_THE_BIT[name]))
    assert run.losses == plain(keys).losses
    assert same(run.weights, plain(keys).weights)


ALMOST_THE_SAME = {
    "compile eager": {"compile.enable": True, "compile.backend": "eager"},
    "compile aot_eager": {"compile.enable": True, "compile.backend": "aot_eager"},
    "compile aot_eager, ac op": {
        "compile.enable": True,
        "compile.backend": "aot_eager",
        "activation_checkpoint.mode": "selective",
    },
    "foreach": {"optimizer.implementation": "foreach"},
    "for-loop": {"optimizer.implementation": "for-loop"},
    "short chunks": {"loss.chunk_rows": 7},
}


@crossed(
    {
        # tests/unit/mtp/test_compile.py compiles every family, tests/distributed whole runs by
        # "aot_eager": a chain, and experts with checkpointing.
        "compile eager": "",
        "compile aot_eager": "",
        "compile aot_eager, ac op": "",
        # The optimizer knows nothing of heads.
        "foreach": "experts",
        "for-loop": "chain",
        "short chunks": "joint head_by_head chain",
    }
)
def test_the_same_but_for_rounding(keys, name, plain, tmp_path):
    run = train(config_of(tmp_path, THREE, keys, ALMOST_THE_SAME[name]))
    torch.testing.assert_close(run.losses, plain(keys).losses, rtol=1e-5, atol=0)
    assert largest_difference(run.weights, plain(keys).weights) < 5e-5


@pytest.mark.slow
def test_inductor_trains_alike(plain, tmp_path):
    keys = HEAD_BY_HEAD
    run = train(config_of(tmp_path, THREE, keys, {"compile.enable": True}))
    torch.testing.assert_close(run.losses, plain(keys).losses, rtol=1e-4, atol=0)
    assert largest_difference(run.weights, plain(keys).weights) < 2e-4


def test_adam_and_its_coupled_decay(tmp_path, plain):
    """Adam without decay equals AdamW without decay; with decay they differ."""
    none = {"optimizer.weight_decay": 0.0}
    adam = {"optimizer.name": "Adam"}
    a = train(config_of(tmp_path / "a", THREE, none))
    b = train(config_of(tmp_path / "b", THREE, none, adam))
    assert largest_difference(a.weights, b.weights) < 1e-6
    c = train(config_of(tmp_path / "c", THREE, adam))
    assert not same(c.weights, plain(JOINT).weights)
    assert not same(c.weights, b.weights)


@crossed({"float32": "head_by_head chain", "bfloat16": "joint experts"})
def test_bfloat16_stays_close(keys, name, plain, tmp_path):
    """Computed in bfloat16 (8 bits of precision), with weights in either type."""
    precision = {"training.mixed_precision_param": "bfloat16", "training.dtype": name}
    run = train(config_of(tmp_path, THREE, keys, precision))
    dtype = getattr(torch, name)
    kept = {weight for weight, w in run.weights.items() if w.dtype != dtype}
    assert all(weight.endswith("expert_bias") for weight in kept)
    assert run.losses != plain(keys).losses
    torch.testing.assert_close(run.losses, plain(keys).losses, rtol=0.02, atol=0)
