"""Import without ceremony: formats found, models of the hub's cache, what other programs leave."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants, snapshot_download
from safetensors.torch import load_file, save_file
from torch import Tensor

from formats_run import DEEPSEEK, PARALLEL, QWEN, QWEN2, RAW, SMALL, write_run
from torchtitan_mtp.cli import import_checkpoint as program
from torchtitan_mtp.data.targets import Batch
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats import export_checkpoint, import_checkpoint
from torchtitan_mtp.formats.importing import find_folder
from torchtitan_mtp.inference import load_for_inference
from torchtitan_mtp.models.transformer import Transformer

transformers = pytest.importorskip("transformers")
IDS = torch.randint(0, 320, (1, 48), generator=torch.Generator().manual_seed(0))


def refusal(action) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@torch.no_grad()
def our_logits(model: Transformer) -> Tensor:
    at = torch.arange(IDS.shape[1])[None]
    batch = Batch(IDS, IDS.new_zeros(*IDS.shape, 0), torch.empty(0), at, torch.zeros_like(at))
    return model.output(model(batch)[0])


@torch.no_grad()
def their_logits(folder: Path) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()(IDS).logits


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("importing")
    write_run(folder / "run", **SMALL)
    export_checkpoint(folder / "run", folder / "hf", "llama_hf")
    return folder / "hf"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen2_hf", QWEN2),
        ("mellum_hf", QWEN),
        ("mimo_hf", QWEN2 | RAW),
        ("deepseek_v3_hf", DEEPSEEK),
        ("meta", SMALL | PARALLEL),
    ],
)
def test_a_format_is_found(tmp_path: Path, name: str, changes) -> None:
    write_run(tmp_path / "run", **changes)
    export_checkpoint(tmp_path / "run", tmp_path / "out", name)
    found = import_checkpoint(tmp_path / "out", tmp_path / "back")
    assert found == import_checkpoint(tmp_path / "out", tmp_path / "again", name)


def hub_cache(folder: Path, model: Path, name: str = "models--org--tiny-1.0") -> Path:
    """As huggingface_hub lays it out: refs/main names a snapshot, whose files are links."""
    repo = folder / name
    shutil.copytree(model, repo / "blobs")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    for commit in ("a" * 40, "b" * 40):
        (repo / "snapshots" / commit).mkdir(parents=True)
    for file in (repo / "blobs").iterdir():
        (repo / "snapshots" / ("a" * 40) / file.name).symlink_to(file)
    return repo


def test_a_model_of_the_hubs_cache(tmp_path: Path, llama: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    message = refusal(lambda: find_folder("org/tiny-1.0"))
    assert message.startswith(f"org/tiny-1.0: no such folder, nor a model in {tmp_path / 'hub'}; ")
    assert message.endswith("hf download org/tiny-1.0")
    repo = hub_cache(tmp_path / "hub", llama)
    expected = snapshot_download("org/tiny-1.0", local_files_only=True)
    assert str(find_folder("org/tiny-1.0")) == str(find_folder(repo)) == expected
    assert program.main(["org/tiny-1.0", str(tmp_path / "out")]) == 0
    assert "3 layers, no further heads" in capsys.readouterr().out
    assert "no such folder" in refusal(lambda: find_folder(tmp_path / "nowhere"))


# ---- Mistral ----

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("said", [True, False])
def test_mistral_that_sees_its_whole_context(tmp_path: Path, said: bool) -> None:
    torch.manual_seed(1)
    config = transformers.MistralConfig(**SHAPE, head_dim=12, sliding_window=None)
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path / "hf")
    if not said:
        edit(tmp_path / "hf", architectures=None)
    expected = their_logits(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "run")
    found = our_logits(load_for_inference(tmp_path / "run")[0])
    assert (found - expected).abs().max() <= 2e-7 and expected.abs().max() > 0.1


def test_a_window(tmp_path: Path) -> None:
    """Also one as long as max_position_embeddings: nothing keeps texts below either."""
    config = transformers.MistralConfig(**SHAPE, sliding_window=16)
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path / "hf")
    windowed = their_logits(tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    values = json.loads(file.read_text())
    unsaid = {k: v for k, v in values.items() if k != "sliding_window"}
    for said, window in (
        (values, 16),
        (values | {"max_position_embeddings": 16}, 16),
        (values | {"sliding_window": 64, "architectures": None}, 64),
        (unsaid, 4096),  # MistralConfig's own
    ):
        file.write_text(json.dumps(said))
        message = refusal(lambda: import_checkpoint(tmp_path / "hf", tmp_path / "run"))
        assert f"config.json: sliding_window = {window} is not supported here; null" in message
    assert not (tmp_path / "run").exists()
    edit(tmp_path / "hf", sliding_window=None)  # as the line says
    import_checkpoint(tmp_path / "hf", tmp_path / "run")
    found = our_logits(load_for_inference(tmp_path / "run")[0])
    assert (found - windowed)[:, :16].abs().max() <= 2e-7 < 1e-3 < (found - windowed).abs().max()


# ---- which model a config.json means ----


def test_a_model_type_of_another_class(tmp_path: Path, llama: Path) -> None:
    """transformers goes by the type, vLLM by the architecture."""
    hf = shutil.copytree(llama, tmp_path / "hf")
    edit(hf, model_type="mistral", sliding_window=8)
    message = refusal(lambda: import_checkpoint(hf, tmp_path / "run"))
    assert "['LlamaForCausalLM'], but model_type = 'mistral' is MistralForCausalLM's" in message
    edit(hf, model_type="gemma", architectures=None)
    message = refusal(lambda: import_checkpoint(hf, tmp_path / "run"))
    assert "architectures = [] is not supported here" in message


@pytest.mark.parametrize("said", [True, False])
def test_an_attention_bias_that_qwen2s_config_has_not(tmp_path: Path, said: bool) -> None:
    write_run(tmp_path / "run", **QWEN2)
    export_checkpoint(tmp_path / "run", tmp_path / "hf", "qwen2_hf")
    edit(tmp_path / "hf", attention_bias=said)
    found = our_logits(load_for_inference(tmp_path / "hf")[0])
    assert (found - their_logits(tmp_path / "hf")).abs().max() <= 1e-6


def test_a_tied_model_with_its_head_alone(tmp_path: Path) -> None:
    write_run(tmp_path / "run", **SMALL | {"model.args.tied_embeddings": True})
    export_checkpoint(tmp_path / "run", tmp_path / "hf", "llama_hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    model = load_for_inference(tmp_path / "hf")[0]
    assert torch.equal(model.tok_embeddings.weight, tensors["lm_head.weight"])
    assert (our_logits(model) - their_logits(tmp_path / "hf")).abs().max() <= 1e-6


# ---- rotary positions ----

LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": LLAMA3, "rope_parameters": PLAIN},
        {"rope_scaling": PLAIN, "rope_parameters": LLAMA3},
        {"rope_scaling": {}, "rope_parameters": LLAMA3},
        {"rope_parameters": LLAMA3, "original_max_position_embeddings": 64},
    ],
    ids=["scaling first", "no scaling first", "empty", "beside"],
)
def test_what_is_said_twice_of_rotary_positions(tmp_path: Path, llama: Path, changes) -> None:
    hf = shutil.copytree(llama, tmp_path / "hf")
    plain = our_logits(load_for_inference(hf)[0])
    edit(hf, **changes)
    found, expected = our_logits(load_for_inference(hf)[0]), their_logits(hf)
    assert (found - expected).abs().max() <= 1e-6
    assert ((plain - expected).abs().max() > 1e-4) == (changes.get("rope_scaling") != PLAIN)


# ---- files ----


def in_shards(folder: Path, *shards: dict[str, Tensor], suffix: str = "safetensors") -> None:
    """The tensors of a folder anew, with an index by which the first shard that has one counts."""
    weight_map: dict[str, str] = {}
    (folder / "model.safetensors").unlink()
    for i, tensors in enumerate(shards, start=1):
        stem = "model" if suffix == "safetensors" else "pytorch_model"
        name = f"{stem}-{i:05d}-of-{len(shards):05d}.{suffix}"
        if suffix == "bin":
            torch.save(tensors, folder / name)
        else:
            save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map = dict.fromkeys(tensors, name) | weight_map
    index = folder / ("pytorch_model.bin" if suffix == "bin" else "model.safetensors")
    index.with_name(f"{index.name}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


NORM = "model.norm.weight"


@pytest.mark.parametrize("by", [0.0, 0.5])
@pytest.mark.parametrize("first", [True, False])
def test_the_index_of_an_overlay_wins(tmp_path: Path, llama: Path, caplog, by, first) -> None:
    hf = shutil.copytree(llama, tmp_path / "hf")
    whole = load_file(hf / "model.safetensors")
    rest = {name: t for name, t in whole.items() if name != NORM}
    stale = rest | {NORM: whole[NORM] + by}
    if first:  # in the order of the files' names
        in_shards(hf, stale, {NORM: whole[NORM]})
        index = hf / "model.safetensors.index.json"
        values = json.loads(index.read_text())
        values["weight_map"][NORM] = "model-00002-of-00002.safetensors"
        index.write_text(json.dumps(values))
    else:
        in_shards(hf, {NORM: whole[NORM]}, stale)
    import_checkpoint(hf, tmp_path / "run")
    assert torch.equal(load_for_inference(tmp_path / "run")[0].norm.weight, whole[NORM])
    told = [r.getMessage() for r in caplog.records if "is not read" in r.getMessage()]
    assert all(f"its {NORM} is not read, and differs by up to 0.5" in line for line in told)
    assert bool(told) == bool(by)


def test_one_file_and_an_index_of_others(tmp_path: Path, llama: Path) -> None:
    hf = shutil.copytree(llama, tmp_path / "hf")
    whole = (hf / "model.safetensors").read_bytes()
    in_shards(hf, load_file(hf / "model.safetensors"))
    (hf / "model.safetensors").write_bytes(whole)
    message = refusal(lambda: import_checkpoint(hf, tmp_path / "run"))
    assert "holds model.safetensors and an index of others; remove what is old" in message


@pytest.mark.parametrize(("shards", "zipped"), [(1, True), (2, True), (1, False)])
def test_pickled_weights(tmp_path: Path, llama: Path, shards: int, zipped: bool) -> None:
    """pytorch_model.bin, as transformers wrote it before safetensors, and torch before 1.6."""
    expected = their_logits(llama)
    hf = shutil.copytree(llama, tmp_path / "hf")
    whole = load_file(hf / "model.safetensors")
    if shards == 1:
        (hf / "model.safetensors").unlink()
        torch.save(whole, hf / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    else:
        names = sorted(whole)
        in_shards(hf, *({n: whole[n] for n in names[i::2]} for i in (0, 1)), suffix="bin")
    assert torch.equal(their_logits(hf), expected)
    import_checkpoint(hf, tmp_path / "run")
    assert torch.allclose(our_logits(load_for_inference(tmp_path / "run")[0]), expected, atol=1e-5)
    for file in hf.glob("pytorch_model*.bin"):
        file.unlink()
    assert "missing" in refusal(lambda: import_checkpoint(hf, tmp_path / "again"))


PICKLES = {
    "an object": SimpleNamespace(a=1),
    "integer keys": {1: torch.ones(2)},
    "sparse": {NORM: torch.ones(2, 2).to_sparse()},
    "meta": {NORM: torch.ones(2, device="meta")},
    "nested": {"state_dict": {NORM: torch.ones(2)}},
    "a list": [torch.ones(2)],
}


@pytest.mark.parametrize("what", [*PICKLES, "an empty stack"])
def test_pickles_that_are_no_weights(tmp_path: Path, llama: Path, what: str) -> None:
    hf = shutil.copytree(llama, tmp_path / "hf")
    (hf / "model.safetensors").unlink()
    file = hf / "pytorch_model.bin"
    if what in PICKLES:
        torch.save(PICKLES[what], file)
    else:
        file.write_bytes(b"0.")
    message = refusal(lambda: import_checkpoint(hf, tmp_path / "run"))
    assert "pytorch_model.bin: " in message
    assert "expected a dict of " in message or "can't be read as plain tensors" in message


class Call:
    """Unpickled without care, it calls a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


CALLS = {
    # The reasons are those of torch/_weights_only_unpickler.py.
    "blocked": (Call(os.system, "true"), "unsupported GLOBAL posix.system whose module posix is"),
    "unknown": (Call(timedelta, 1), "GLOBAL datetime.timedelta was not an allowed global"),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("what", CALLS)
def test_pickles_that_call(tmp_path: Path, llama: Path, what: str, zipped: bool) -> None:
    """The reason is told, and not torch's advice to run them nevertheless."""
    hf = shutil.copytree(llama, tmp_path / "hf")
    (hf / "model.safetensors").unlink()
    value, reason = CALLS[what]
    file = hf / "pytorch_model.bin"
    torch.save({NORM: value}, file, _use_new_zipfile_serialization=zipped)
    message = refusal(lambda: import_checkpoint(hf, tmp_path / "run"))
    assert message.startswith(f"{file}: can't be read as plain tensors: UnpicklingError: ")
    assert reason in message
    assert not re.search("safe_globals|weights_only|trust|options|Weights only", message)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4567\n"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(("content", "shown"), [(POINTER, "a pointer of git-lfs"), (b"", "empty")])
def test_a_file_of_weights_that_is_none(
    tmp_path: Path, llama: Path, name: str, content: bytes, shown: str
) -> None:
    """A clone without git-lfs has pointers; a download that was cut off, an empty file."""
    hf = shutil.copytree(llama, tmp_path / "hf")
    (hf / "model.safetensors").unlink()
    (hf / name).write_bytes(content)
    message = refusal(lambda: import_checkpoint(hf, tmp_path / "run"))
    assert message.startswith(f"{hf / name}: {shown}") and message.endswith("download it again")


# ---- what is not read, by its real reason ----


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "weights (gptq)"),
        ({"quantization_config": {"quant_method": "awq"}}, "weights (awq)"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "weights (bitsandbytes)"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "(compressed-tensors)"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "weights (another program's)"),
        ({"quantization_config": [4]}, "quantization_config = [4], expected an object"),
    ],
)
def test_quantized_folders(tmp_path: Path, llama: Path, changes, shown: str) -> None:
    hf = shutil.copytree(llama, tmp_path / "hf")
    edit(hf, **changes)
    for action in (
        lambda: import_checkpoint(hf, tmp_path / "run"),
        lambda: load_for_inference(hf),
    ):
        message = refusal(action)
        assert shown in message and str(hf / "config.json") in message


def test_fp8_of_another_layout(tmp_path: Path, llama: Path) -> None:
    """One scale a tensor, under the name that compressed-tensors gives it."""
    hf = shutil.copytree(llama, tmp_path / "hf")
    tensors = load_file(hf / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(1)
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    edit(hf, quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"})
    message = refusal(lambda: import_checkpoint(hf, tmp_path / "run"))
    assert f"{name} (48, 32) is in FP8 with {name}_scale_inv missing, expected (1, 1)" in message


@pytest.mark.parametrize(
    ("file", "key", "value", "why"),
    [
        ("config.json", "compression_config", {"quant_method": "x"}, "quantized weights (x) are"),
        ("hf_quant_config.json", "quantization", {}, "quantized weights (hf_quant_config.json)"),
        (
            *("config.json", "quantization_config"),
            {"quant_method": "fp8", "activation_scheme": "static"},
            "activation_scheme = 'static' is not supported here, only 'dynamic'",
        ),
        (
            *("config.json", "quantization_config"),
            {"quant_method": "fp8", "weight_block_size": None},
            "weight_block_size = None, expected two integers above 0",
        ),
    ],
    ids=["older key", "modelopt", "static", "one scale a weight"],
)
def test_why_quantized_weights_are_not_read(tmp_path, llama, file, key, value, why) -> None:
    hf = shutil.copytree(llama, tmp_path / "hf")
    tensors = load_file(hf / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors |= {f"{name}_scale_inv": torch.ones(()), f"{name}_extra": torch.ones(())}
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    (hf / file).touch()
    (hf / file).write_text(json.dumps(json.loads((hf / file).read_text() or "{}") | {key: value}))
    assert why in refusal(lambda: import_checkpoint(hf, tmp_path / "run"))


def test_a_mixture_of_glms(tmp_path: Path) -> None:
    config = transformers.Glm4MoeConfig(
        **SHAPE, n_routed_experts=8, moe_intermediate_size=16, first_k_dense_replace=1, head_dim=8
    )
    transformers.Glm4MoeForCausalLM(config).save_pretrained(tmp_path / "hf")
    message = refusal(lambda: import_checkpoint(tmp_path / "hf", tmp_path / "run"))
    assert "n_routed_experts = 8: GLM's mixtures of experts are not supported here" in message


@pytest.mark.parametrize("width", [8, 30, 500])
def test_metas_rule_gives_any_width(tmp_path: Path, width: int) -> None:
    """Meta's code: 2/3 of 4 * dim, times the multiplier, rounded up."""
    write_run(tmp_path / "run", **SMALL | {"model.args.hidden_dim": width})
    export_checkpoint(tmp_path / "run", tmp_path / "out", "meta")
    params = json.loads((tmp_path / "out" / "params.json").read_text())
    hidden = int(params["ffn_dim_multiplier"] * int(2 * 4 * params["dim"] / 3))
    of = params["multiple_of"]
    assert of * ((hidden + of - 1) // of) == width
    assert import_checkpoint(tmp_path / "out", tmp_path / "back").args.ffn_dim == width
