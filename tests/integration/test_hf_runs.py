"""Whole runs on a trunk that transformers runs: the same losses as this project's own model of the
same folder; resume to the bit; a frozen trunk; what is wrong with a folder, in one line."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from hf_folders import write_folder
from runs import config_of, interrupt_after, same, train
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats.training import config_of_hf

HF = {
    "model.name": "hf",
    "checkpoint.enable": True,
    "checkpoint.initial_load_in_hf": True,
    "checkpoint.interval": 100,
}
COPIED = {"mtp.init": "copy_last_layer"}  # the same start in both, whatever the random stream
SAVES = {"checkpoint.interval": 3, "checkpoint.last_save_model_only": False}


def of_folder(folder) -> dict:
    return {"model.hf_assets_path": str(folder), "checkpoint.initial_load_path": str(folder)}


@pytest.mark.parametrize("family", ["llama_tied", "qwen2", "qwen3", "deepseek_v3"])
def test_the_native_model_of_a_folder_gives_the_same_losses(family, tmp_path) -> None:
    folder = write_folder(tmp_path / "folder", family)
    common = {**of_folder(folder), **COPIED, "training.steps": 8, "optimizer.lr": 1e-3}
    theirs = train(config_of(tmp_path / "hf", HF, common))
    own = config_of(tmp_path / "native", HF, common)
    own.model = config_of_hf(folder).model
    own.model.converters = ["mtp"]
    if family == "deepseek_v3":
        own.model.args.moe.load_balance_coeff = 0.0  # transformers moves no bias
    ours = train(own)
    assert len(ours.losses) == 8
    torch.testing.assert_close(
        torch.tensor(theirs.losses), torch.tensor(ours.losses), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("family", "heads"),
    [
        ("llama_tied", "parallel"),
        ("granite", "medusa"),
        ("qwen3_5", "sequential"),
        pytest.param("gemma3", "sequential", marks=pytest.mark.exhaustive),
        pytest.param("qwen3_moe", "parallel", marks=pytest.mark.exhaustive),
    ],
)
def test_three_and_three_steps_are_six(family, heads, tmp_path) -> None:
    folder = write_folder(tmp_path / "folder", family)
    keys = {**HF, **of_folder(folder), "mtp.heads": heads}
    whole = train(config_of(tmp_path / "whole", keys))
    first = train(config_of(tmp_path / "parts", keys, SAVES), interrupt_after(3))
    second = train(config_of(tmp_path / "parts", keys, SAVES))
    assert (second.start, first.losses + second.losses) == (3, whole.losses)
    assert same(second.weights, whole.weights)


def test_a_frozen_trunk_stays_to_the_bit(tmp_path) -> None:
    folder = write_folder(tmp_path / "folder", "gemma2")
    keys = {**HF, **of_folder(folder), "mtp.train": "heads"}
    start = train(config_of(tmp_path / "start", keys, {"training.steps": 1, "optimizer.lr": 1e-9}))
    run = train(config_of(tmp_path / "run", keys))
    assert same(run.trunk, start.trunk)
    heads = {name for name in run.weights if name.startswith("mtp.")}
    assert heads
    assert not any(torch.equal(run.weights[name], start.weights[name]) for name in heads)
    with safe_open(folder / "model.safetensors", "pt") as file:  # the folder's own numbers
        assert torch.equal(run.weights[norm := "model.norm.weight"], file.get_tensor(norm))


def test_from_scratch_without_weights(tmp_path) -> None:
    """A folder's config and tokenizer alone; the seed decides the weights, on any rank."""
    folder = write_folder(tmp_path / "folder", "qwen3_next")
    (folder / "model.safetensors").unlink()
    keys = {"model.name": "hf", "model.hf_assets_path": str(folder), "training.steps": 1}
    runs = [train(config_of(tmp_path / name, keys)) for name in "ab"]
    assert same(runs[0].weights, runs[1].weights)
    other = train(config_of(tmp_path / "c", keys, {"training.seed": 1}))
    assert not same(runs[0].weights, other.weights)


def change(folder, **values) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


WRONG = {
    "no config.json": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "unknown": (lambda f: change(f, model_type="nobody"), "no config.json that transformers"),
    "code": (
        lambda f: change(f, model_type="mine", auto_map={"AutoConfig": "mine.Mine"}),
        "no config.json that transformers can read",
    ),
    "quantised": (
        lambda f: change(f, quantization_config={"quant_method": "fp8"}),
        "quantised; take the folder before that",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: missing"),
    "other sizes": (lambda f: change(f, intermediate_size=64), "has the shape"),
    "learned positions": (
        lambda f: change(f, model_type="gpt2", architectures=["GPT2LMHeadModel"]),
        "has weights in wpe, beside its layers",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_a_folder(what, tmp_path) -> None:
    folder = write_folder(tmp_path / "folder", "llama")
    damage, expected = WRONG[what]
    damage(folder)
    with pytest.raises(UserError, match=expected) as caught:
        train(config_of(tmp_path / "run", HF, of_folder(folder)))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value) or "GPT2LMHeadModel" in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"model.args.dim": 64}, r'model.args.dim: model.name = "hf" takes all sizes'),
        ({"model.vocab_size": 512}, r'model.vocab_size: model.name = "hf" takes all sizes'),
        ({"model.hf_assets_path": "byte"}, "needs the folder of a model"),
        ({"mtp.match_parameters": True}, "keeps its layers"),
        ({"loss.softcap": 5.0}, "loss.softcap = 5.0: the model of .* has none"),
        ({"checkpoint.last_save_in_hf": True, "checkpoint.enable": True}, "last_save_in_hf"),
    ],
)
def test_settings_that_such_a_model_does_not_take(keys, expected, tmp_path) -> None:
    folder = write_folder(tmp_path / "folder", "llama")
    with pytest.raises(UserError, match=expected):
        train(config_of(tmp_path / "run", HF, of_folder(folder), keys))
