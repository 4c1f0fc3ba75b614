"""Whole runs on a GPU beside the same ones on the CPU, which are in float32 and without options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from on_device import CPU, CPU_AT_LENGTH, GPU, at_length
from test_engine import CASES, check_against_naive

from runs import (
    DEEPSEEK,
    EXPERTS,
    HEAD_BY_HEAD,
    JOINT,
    SEQUENTIAL,
    TINY,
    Run,
    config_of,
    interrupt_after,
    same,
    train,
    validation,
    write_corpus,
)
from torchtitan_mtp.distributed import mesh
from torchtitan_mtp.models.args import LatentArgs
from torchtitan_mtp.models.flavors import flavors
from torchtitan_mtp.models.init import copy_full_tensor, seed_of
from torchtitan_mtp.trainer import Trainer

# Heads that FlexAttention, FlashAttention and (of DeepSeek-V3's widths) cuDNN take.
WIDE = replace(TINY, dim=64)
WIDE_LATENT = replace(
    EXPERTS,
    dim=64,
    n_heads=2,
    latent=LatentArgs(16, 32, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
)
FAMILIES: dict[str, dict[str, Any]] = {
    "joint": JOINT,
    "head_by_head": HEAD_BY_HEAD,
    "chain": SEQUENTIAL,
    "medusa": {"mtp.heads": "medusa"},
    "experts": {**DEEPSEEK, "model.args.moe.aux_loss_coeff": 0.01},
    "distilled": {**HEAD_BY_HEAD, "mtp.target": "trunk", "mtp.target_loss": "kl"},
}
THREE = {"training.steps": 3, "model.flavor": "wide", "training.global_batch_size": 4}
BF16 = {"training.mixed_precision_param": "bfloat16"}
PACKED = {"model.attn_mask_type": "block_causal"}
OP = {"activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "op"}
SECOND = {**OP, "activation_checkpoint.selective_ac_option": "2"}
FULL = {"activation_checkpoint.mode": "full"}
COMPILE = {"compile.enable": True}
TRITON = {"loss.passes": "triton"}


def float8(recipe: str) -> dict[str, Any]:
    return {
        "model.converters": ["mtp", "quantize.linear.float8"],
        "quantize.linear.float8.recipe_name": recipe,
        **BF16,
    }


# Options, and the families that they run with.
RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "float32": ({}, " ".join(FAMILIES)),
    "bfloat16": (BF16, " ".join(FAMILIES)),
    "packed, float32": (PACKED, "head_by_head chain"),
    "packed": ({**PACKED, **BF16}, "joint experts"),
    "varlen": ({**PACKED, **BF16, "model.attn_type": "varlen"}, "head_by_head experts"),
    "ac op": (OP, "head_by_head chain"),
    "ac second": (SECOND, "experts"),
    "ac full": ({**FULL, **BF16}, "joint chain"),
    "offload": ({"training.enable_cpu_offload": True}, "head_by_head experts"),
    "reduced once": ({"training.reduce_every_micro_batch": False}, "head_by_head chain"),
    "deterministic": ({"training.deterministic": True, **BF16}, "joint experts"),
    "triton": ({**TRITON, "loss.bf16_logits": True, **BF16}, "head_by_head distilled"),
    "triton, float32": ({**TRITON, "loss.z_loss": 1e-3}, "chain"),
    "compiled": ({**COMPILE, **OP, **BF16}, "head_by_head experts"),
    "compiled, float32": ({**COMPILE, **FULL}, "chain"),
    "tensorwise": (float8("tensorwise"), "joint chain"),
    "rowwise": (float8("rowwise"), "head_by_head experts"),
    "tensorwise, compiled": ({**float8("tensorwise"), **COMPILE, **OP}, "head_by_head"),
    "rowwise, compiled": ({**float8("rowwise"), **COMPILE, **OP}, "chain"),
}
ON_A_GPU_ALONE = [name for name in RUNS if "triton" in name or "compiled" in name]
IN_EVERY_SUITE = [("bfloat16", "head_by_head")]
# What a CPU's run has too, as it changes what is computed.
COMPUTED_OTHERWISE = ("model.attn_mask_type", "loss.z_loss")


def cases() -> list[Any]:
    found = []
    for option, (_, families) in RUNS.items():
        for family in families.split():
            found.append(pytest.param("cuda", option, family, marks=GPU.marks))
            if option not in ON_A_GPU_ALONE:
                where = CPU if (option, family) in IN_EVERY_SUITE else CPU_AT_LENGTH
                found.append(pytest.param("cpu", option, family, marks=where.marks))
    return found


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(flavors["llama3"], "wide", WIDE)
    monkeypatch.setitem(flavors["deepseek_v3"], "wide", WIDE_LATENT)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("data")
    write_corpus(folder / "held_out", "jsonl", seed=1)
    keys = write_corpus(folder, "jsonl")
    return {**keys, **validation(folder, freq=3), "validation.steps": 2}


@pytest.fixture(scope="module")
def references() -> dict[str, Run]:
    return {}


@torch.no_grad()
def same_weights(trainer: Trainer) -> None:
    """Not those of a random generator of the device."""
    for name, param in trainer.model.named_parameters():
        generator = torch.Generator().manual_seed(seed_of(name, 0))
        value = torch.randn(param.shape, generator=generator)
        value = 1 + 0.1 * value if param.ndim == 1 else value * param.shape[-1] ** -0.5
        if name.endswith("router.gate.weight"):
            value *= 10  # decided, whatever is rounded
        copy_full_tensor(param, value.to(param))


@pytest.fixture
def run_on(data, tmp_path, monkeypatch) -> Callable[..., Run]:
    def run(device: str, folder: str, *keys: dict[str, Any], prepare=same_weights) -> Run:
        with monkeypatch.context() as patch:
            if device == "cpu":
                patch.setattr(mesh, "local_device", lambda: torch.device("cpu"))
            return train(config_of(tmp_path / folder, THREE, data, *keys), prepare)

    return run


@pytest.mark.parametrize(("device", "option", "family"), cases())
def test_a_run_is_that_of_the_cpu(device, option, family, run_on, references):
    keys, _ = RUNS[option]
    if "quantize.linear.float8" in keys.get("model.converters", []) and device == "cuda":
        card = torch.cuda.get_device_capability()
        if card < ((9, 0) if "rowwise" in option else (8, 9)):
            pytest.skip(f"{torch.cuda.get_device_name()} has no such float8 products")
    both = {key: value for key, value in keys.items() if key in COMPUTED_OTHERWISE}
    name = f"{family} {both}"
    if name not in references:
        references[name] = run_on("cpu", "reference", FAMILIES[family], both)
    expected, found = references[name], run_on(device, "run", FAMILIES[family], keys)
    assert [step["n_tokens_seen"] for step in found.logged] == [128, 256, 384]
    tolerance = 0.03 if keys.get("training.mixed_precision_param") else 1e-4
    for a, b in ((found.losses, expected.losses), (found.validated, expected.validated)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=0)
    norms = ([step["grad_norm"] for step in run.logged] for run in (found, expected))
    torch.testing.assert_close(*norms, rtol=4 * tolerance, atol=0)
    assert len({loss[0] for loss in found.losses}) == 3


@pytest.mark.cuda
@pytest.mark.parametrize("shape", ["plain", "deepseek"])
@pytest.mark.parametrize("mtp", CASES, ids=lambda mtp: mtp.heads)
def test_every_gradient_in_float64(mtp, shape):
    check_against_naive(mtp, shape, torch.device("cuda"))


@at_length
@pytest.mark.parametrize("family", ["head_by_head", "chain", "experts"])
def test_an_interrupted_run_goes_on_to_the_bit(family, device, run_on, tmp_path):
    """As `training.deterministic` has it: without, attention's backward adds in any order."""
    keys = {**FAMILIES[family], **BF16, "training.deterministic": True, "training.steps": 4}
    saves = {
        "checkpoint.enable": True,
        "checkpoint.interval": 2,
        "checkpoint.last_save_model_only": False,
    }
    whole = run_on(device, "whole", keys, prepare=None)
    run_on(device, "parts", keys, saves, prepare=interrupt_after(2))
    second = run_on(device, "parts", keys, saves, prepare=None)
    assert second.start == 2 and second.losses == whole.losses[2:]
    assert same(second.weights, whole.weights)
