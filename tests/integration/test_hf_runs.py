"""Whole runs on a trunk that transformers runs: the same losses as this project's own model of the
same folder; resume to the bit; a frozen trunk; what is wrong with a folder, in one line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_folders import write_folder
from native_folders import write_shards
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


def change_tensor(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[QUERY] = change(tensors[QUERY])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def without_tokenizer(folder, *files: str) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    for name in files:
        (folder / name).write_text("{}")


def without_a_shard(folder) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_shards(folder, tensors, {QUERY: tensors.pop(QUERY)})
    (folder / "model-00002-of-00003.safetensors").unlink()


QUERY = "model.layers.0.self_attn.q_proj.weight"
FP8 = {"quant_method": "fp8"}
NO_TOKENIZER = "the folder holds none of tokenizer.json, tokenizer.model"
VISION = {
    "text_config": {"model_type": "llama"},
    "vision_config": {"model_type": "clip_vision_model"},
}
WRONG = {
    "no config.json": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "no JSON": (lambda f: (f / "config.json").write_text("{'"), "config.json: not a JSON object"),
    "unknown": (lambda f: change(f, model_type="nobody"), "no config.json that transformers"),
    "code": (
        lambda f: change(f, model_type="mine", auto_map={"AutoConfig": "mine.Mine"}),
        "no config.json that transformers can read",
    ),
    "vision": (lambda f: change(f, model_type="llava", **VISION), "'llava' is a model of more"),
    "encoder": (lambda f: change(f, model_type="t5"), "no causal language model of it"),
    "quantised": (
        lambda f: change(f, quantization_config=FP8),
        "quantised; take the folder before that",
    ),
    "quantised, said beside": (
        lambda f: (f / "hf_quant_config.json").write_text("{}"),
        "quantised; take the folder before that",
    ),
    "quantised, said nowhere": (
        lambda f: change_tensor(f, lambda t: t.to(torch.float8_e4m3fn)),
        f"{QUERY} is of torch.float8_e4m3fn, quantised; take the folder before that",
    ),
    "no layers": (lambda f: change(f, num_hidden_layers=0), "num_hidden_layers = 0, expected an"),
    "no width": (lambda f: change(f, intermediate_size=0), r"leave .*mlp.* empty, \(0, 32\)"),
    "activation": (
        lambda f: change(f, hidden_act="nobody"),
        "transformers can't build it: KeyError: 'nobody'",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: missing"),
    "a lost shard": (without_a_shard, "model-00002-of-00003.safetensors: missing; download it"),
    "other sizes": (lambda f: change(f, intermediate_size=64), "has the shape"),
    "a tensor's shape": (
        lambda f: change_tensor(f, lambda t: t[:8].clone()),
        rf"{QUERY} has the shape \(8, 32\), expected \(32, 32\), as config.json says",
    ),
    "no tokenizer": (without_tokenizer, NO_TOKENIZER),
    "a processor alone": (
        lambda f: without_tokenizer(f, "processor_config.json", "preprocessor_config.json"),
        NO_TOKENIZER,
    ),
    "few rows": (
        lambda f: change(f, vocab_size=100),
        "its tokenizer makes ids up to 261, its model has vocab_size = 100",
    ),
    "learned positions": (
        lambda f: change(f, model_type="gpt2", architectures=["GPT2LMHeadModel"]),
        "has weights in wpe, beside its layers",
    ),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("wrong") / "llama", "llama")


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_a_folder(what, llama, tmp_path) -> None:
    folder = shutil.copytree(llama, tmp_path / "folder")
    damage, expected = WRONG[what]
    damage(folder)
    with pytest.raises(UserError, match=expected) as caught:
        train(config_of(tmp_path / "run", HF, of_folder(folder)))
    assert "\n" not in str(caught.value)
    assert any(said in str(caught.value) for said in (str(folder), "config.json: ", "GPT2LMHead"))


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
