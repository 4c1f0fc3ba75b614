"""Modules of released folders: loaded they compute what their engines compute, and go back as they
came."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_folders import write_folder
from hf_models import CONFIGS
from native_folders import ALL, LAYERS, RELEASED, tensors_of, write_native
from torchtitan_mtp.build import model_from_config
from torchtitan_mtp.checkpoint.manifest import MODEL_ONLY, Manifest, write_manifest
from torchtitan_mtp.checkpoint.record import record_of_model
from torchtitan_mtp.checkpoint.storage import SummingWriter
from torchtitan_mtp.config import JobConfig, to_toml
from torchtitan_mtp.data.targets import Batch, Window, make_batch
from torchtitan_mtp.distributed.ranks import Ranks
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats import export_checkpoint
from torchtitan_mtp.formats.hf_trunk import TrunkFolder
from torchtitan_mtp.formats.training import load_hf_weights
from torchtitan_mtp.inference import generate, load_for_inference
from torchtitan_mtp.models.hf import HFTrunk

INDEX = "model.safetensors.index.json"
DTYPE = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def config_of(folder: Path, n: int, raw: bool, **changes: Any) -> JobConfig:
    config = JobConfig()
    config.model.name, config.model.hf_assets_path = "hf", str(folder)
    config.training.seq_len = 16
    if n > 1:
        config.model.converters = ["mtp"]
        config.mtp.heads, config.mtp.num_future_tokens = "sequential", n
        config.mtp.trunk_state = "raw" if raw else "normalized"
    for key, value in changes.items():
        setattr(config.mtp, key, value)
    return config


def loaded(folder: Path, config: JobConfig, exclude: tuple[str, ...] = ()) -> HFTrunk:
    model = model_from_config(config, 0, torch.float32)
    assert isinstance(model, HFTrunk)
    model.to_empty(device="cpu")
    model.tie_weights()
    model.init_weights(seed=3)
    load_hf_weights(folder, model, Ranks(alone=True), exclude)
    return model.requires_grad_(False)


def write_run(run: Path, model: HFTrunk, config: JobConfig) -> Path:
    run.mkdir()
    (run / "config.toml").write_text(to_toml(config))
    step = run / "checkpoint" / "step-0"
    writer = SummingWriter(step)
    dcp.save(model.state_dict(), storage_writer=writer, no_dist=True)
    manifest = Manifest(0, MODEL_ONLY, 1, writer.entries, record_of_model(model))
    write_manifest(step, manifest)
    return run


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def batch_of(n: int) -> Batch:
    tokens = torch.randint(3, 200, (2, 11 + n), generator=torch.Generator().manual_seed(1))
    return make_batch(Window(tokens, torch.zeros_like(tokens)), n)


def formula(name: str, deeper: Any, disk: dict[str, Tensor], batch: Batch, n: int) -> list[Tensor]:
    """Hidden states of heads 1..n as the engines' sources have them, of transformers' own model,
    layers LAYERS.. of which are the modules' blocks."""
    kind, inner = ALL[name], deeper.model

    def norm(part: str, k: int, x: Tensor) -> Tensor:
        weight = disk[kind.own[part].format(k=k, layer=LAYERS + k)]
        own = type(inner.norm)(weight.numel(), eps=deeper.config.rms_norm_eps)
        own.weight.data.copy_(weight)
        return own(x)

    def through(layers: list[Any], x: Tensor) -> Tensor:
        """transformers' forward on these layers, up to its final norm."""
        kept, types = (inner.layers, inner.norm), getattr(inner.config, "layer_types", None)
        depth = inner.config.num_hidden_layers
        inner.layers, inner.norm = torch.nn.ModuleList(layers), torch.nn.Identity()
        inner.config.num_hidden_layers = len(layers)
        if types:
            numbers = [list(kept[0]).index(layer) for layer in layers]
            inner.config.layer_types = [types[i] for i in numbers]
        out = inner(inputs_embeds=x, use_cache=False).last_hidden_state
        inner.layers, inner.norm = kept
        inner.config.num_hidden_layers = depth
        if types:
            inner.config.layer_types = types
        return out

    embed = inner.embed_tokens
    raw = through(list(inner.layers)[:LAYERS], embed(batch.tokens))
    hiddens = [inner.norm(raw)]
    h = raw if kind.raw else hiddens[0]
    for k in range(n - 1):
        emb = norm("enorm", k, embed(batch.future_tokens[..., k]))
        pair = (norm("hnorm", k, h), emb) if kind.hidden_first else (emb, norm("hnorm", k, h))
        proj = disk[kind.own["eh_proj"].format(k=k, layer=LAYERS + k)]
        x = torch.cat(pair, dim=-1) @ proj.T
        h = norm("norm", k, through([inner.layers[LAYERS + k]], x))
        hiddens.append(h)
    return hiddens


@pytest.mark.parametrize("name", ALL)
def test_heads_are_the_modules_of_the_folder(name: str, tmp_path: Path) -> None:
    modules = ALL[name].modules
    deeper = write_native(tmp_path / "model", name, modules)
    model = loaded(tmp_path / "model", config_of(tmp_path / "model", modules + 1, name == "mimo"))
    batch = batch_of(modules + 1)
    with torch.no_grad():
        wanted = formula(name, deeper, tensors_of(tmp_path / "model"), batch, modules + 1)
        for ours, theirs in zip(model(batch), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["glm4_moe", "qwen3_next"])
def test_a_folder_decodes_with_its_modules(name: str, tmp_path: Path) -> None:
    """And heads of another family begin on it without them, whatever their layers' numbers are."""
    modules = RELEASED[name].modules
    source = tmp_path / "model"
    write_native(source, name, modules)
    model, _, _ = load_for_inference(source)
    wanted = loaded(source, config_of(source, modules + 1, False))
    batch = batch_of(modules + 1)
    assert all(torch.equal(*pair) for pair in zip(model(batch), wanted(batch), strict=True))
    generate(model, [[5, 6, 7]], 4, eos_id=[], speculative=True)
    other = loaded(source, config_of(source, 2, False, heads="parallel"))
    assert torch.equal(other.output.weight, wanted.output.weight)


def in_turn(values: Iterable[Any]) -> list[Any]:
    """Each released folder with one of two values; with the other exhaustively."""
    return [
        pytest.param(name, value, marks=() if (i + j) % 2 else pytest.mark.exhaustive)
        for i, name in enumerate(ALL)
        for j, value in enumerate(values)
    ]


@pytest.mark.parametrize(("name", "dtype"), in_turn(DTYPE))
def test_untrained_the_folder_comes_back_file_for_file(
    name: str, dtype: str, tmp_path: Path
) -> None:
    source, modules = tmp_path / "model", ALL[name].modules
    write_native(source, name, modules, DTYPE[dtype])
    config = config_of(source, modules + 1, name == "mimo")
    run = write_run(tmp_path / "run", loaded(source, config), config)
    export_checkpoint(run, tmp_path / "out", "same")
    assert files_of(tmp_path / "out") == files_of(source)


@pytest.mark.parametrize("name", RELEASED)
def test_what_was_trained_lies_where_it_lay(name: str, tmp_path: Path) -> None:
    """Trunk and modules, doubled in memory, are doubled on disk."""
    source = tmp_path / "model"
    write_native(source, name)
    config = config_of(source, 2, name == "mimo")
    model = loaded(source, config)
    for tensor in model.state_dict().values():
        tensor.mul_(2)
    export_checkpoint(write_run(tmp_path / "run", model, config), tmp_path / "out", "same")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], 2 * tensor), key
    others = [files_of(folder) for folder in (source, tmp_path / "out")]
    for files in others:
        for file in [file for file in files if file.endswith(".safetensors")]:
            del files[file]
    assert others[0] == others[1]


@pytest.mark.parametrize("family", CONFIGS)
def test_every_trunks_tensors_come_back(family: str, tmp_path: Path) -> None:
    """What transformers makes of a folder's tensors, unmade, is the folder's tensors."""
    write_folder(tmp_path, family)
    config = config_of(tmp_path, 1, False)
    folder = TrunkFolder(tmp_path, model_from_config(config, 0, torch.float32))
    made = dict(folder.read())
    found: dict[str, Tensor] = {}
    for part, back in folder.written().items():
        found[folder.on_disk(part)] = back(made.__getitem__)[part]
    wanted = tensors_of(tmp_path)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_an_output_that_a_folder_has_beside_the_one_that_it_ties(tmp_path: Path) -> None:
    """transformers computes with it where it differs, so it is not passed over."""
    write_folder(tmp_path, "llama_tied")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, file, {"format": "pt"})
    config = config_of(tmp_path, 1, False)
    model = loaded(tmp_path, config)
    assert torch.equal(model.output.weight, embedding)
    export_checkpoint(write_run(tmp_path / "run", model, config), tmp_path / "out", "same")
    assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    save_file(tensors | {"lm_head.weight": embedding + 0.5}, file, {"format": "pt"})
    found = r"lm_head.weight differs from model.embed_tokens.weight by up to 0.5; config.json ties"
    with pytest.raises(UserError, match=found):
        loaded(tmp_path, config)


def without_modules(source: Path, name: str, single: bool) -> set[str]:
    """Take the modules out of a folder, into one file or two; what their names were."""
    gone = set(load_file(source / "model-00003-of-00003.safetensors"))
    (source / "model-00003-of-00003.safetensors").unlink()
    index = json.loads((source / INDEX).read_text())
    index["weight_map"] = {k: f for k, f in index["weight_map"].items() if k not in gone}
    (source / INDEX).write_text(json.dumps(index))
    if single:
        save_file(tensors_of(source), source / "model.safetensors", {"format": "pt"})
        (source / INDEX).unlink()
        for file in source.glob("model-*"):
            file.unlink()
    change_config(source, **{ALL[name].count: 0})
    return gone


def change_config(folder: Path, **changes: Any) -> None:
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | changes, indent=2))


@pytest.mark.parametrize(("name", "single"), in_turn((False, True)))
def test_new_modules_lie_as_released_ones_do(name: str, single: bool, tmp_path: Path) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    write_native(source, name, dtype=torch.bfloat16)
    released = without_modules(source, name, single)
    config = config_of(source, 2, name == "mimo")
    model = loaded(source, config)
    model.to(torch.bfloat16)
    export_checkpoint(write_run(tmp_path / "run", model, config), out, "same")
    assert set(load_file(out / "model-mtp.safetensors")) == released
    index = json.loads((out / INDEX).read_text())
    assert index["weight_map"].keys() == tensors_of(out).keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(out).values())
    assert not (out / "model.safetensors").exists()  # a reader would take it for all
    before = {file.read_bytes() for file in source.glob("*.safetensors")}
    assert before <= {file.read_bytes() for file in out.glob("*.safetensors")}
    assert json.loads((out / "config.json").read_text())[ALL[name].count] == 1
    again = loaded(out, config_of(out, 2, name == "mimo"))
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor.float()), key


@pytest.mark.parametrize("name", ["glm4_moe", "qwen3_5", "mimo"])
def test_modules_that_the_config_promises_and_no_file_has(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "model"
    write_native(source, name)
    without_modules(source, name, single=False)
    loaded(source, config_of(source, 2, name == "mimo"))
    assert "no module" not in caplog.text
    change_config(source, **{ALL[name].count: 1})
    loaded(source, config_of(source, 2, name == "mimo"))
    lost = f"{source}: config.json says {ALL[name].count} = 1, and the folder has no module"
    assert f"{lost}; the heads start anew" in caplog.text


def test_heads_are_dropped_with_the_modules_that_were_there(tmp_path: Path) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    write_native(source, "glm4_moe", 2)
    released = set(load_file(source / "model-00003-of-00003.safetensors"))
    config = config_of(source, 3, False)
    run = write_run(tmp_path / "run", loaded(source, config), config)
    export_checkpoint(run, out, "same", drop_heads=True)
    assert tensors_of(out).keys() == tensors_of(source).keys() - released
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0
    export_checkpoint(run, tmp_path / "one", "same", modules=1)
    one = tensors_of(tmp_path / "one").keys()
    assert tensors_of(source).keys() - one == {key for key in released if ".5." in key}


def test_a_trunk_without_known_modules_comes_back_alone(tmp_path: Path) -> None:
    """Its heads go nowhere, which is said, with what to do."""
    source, out = write_folder(tmp_path / "model", "llama_tied"), tmp_path / "out"
    config = config_of(source, 2, False)
    model = loaded(source, config)
    for tensor in dict(model.named_parameters()).values():
        tensor.mul_(2)
    run = write_run(tmp_path / "run", model, config)
    with pytest.raises(UserError) as error:
        export_checkpoint(run, out, "same")
    assert str(error.value) == (
        "--format same: no engine knows modules beside LlamaForCausalLM; import it as llama_hf and "
        "train that, or leave the heads out with --drop_heads"
    )
    with pytest.raises(UserError, match=r'llama_hf: holds no model of model.name = "hf"'):
        export_checkpoint(run, out, "llama_hf", drop_heads=True)
    with pytest.raises(UserError, match="--dtype: --format same keeps"):
        export_checkpoint(run, out, "same", dtype=torch.float16, drop_heads=True)
    assert not out.exists()
    export_checkpoint(run, out, "same", drop_heads=True)
    before, after = tensors_of(source), tensors_of(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], 2 * before[key]) for key in before)


def test_a_language_model_beside_vision(tmp_path: Path) -> None:
    """Qwen3.5 as it is released: the text model is one part of the folder, and alone is trained."""
    plain, source = tmp_path / "plain", tmp_path / "model"
    write_native(plain, "qwen3_5")
    source.mkdir()
    tensors = {
        key.replace("model.", "model.language_model.", 1): t for key, t in tensors_of(plain).items()
    }
    tensors["model.visual.patch_embed.proj.weight"] = torch.randn(4, 4)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (source / "tokenizer.json").write_bytes((plain / "tokenizer.json").read_bytes())
    text = json.loads((plain / "config.json").read_text())
    outer = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": {k: v for k, v in text.items() if k != "architectures"},
        "vision_config": {"depth": 1, "hidden_size": 16, "num_heads": 2},
    }
    (source / "config.json").write_text(json.dumps(outer))
    config = config_of(source, 2, False)
    model, same = loaded(source, config), loaded(plain, config_of(plain, 2, False))
    for key, tensor in same.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    for tensor in model.state_dict().values():
        tensor.mul_(2)
    export_checkpoint(write_run(tmp_path / "run", model, config), tmp_path / "out", "same")
    after = tensors_of(tmp_path / "out")
    for key, tensor in tensors.items():
        assert torch.equal(after[key], tensor if "visual" in key else 2 * tensor), key


def test_copies_of_what_modules_share(tmp_path: Path) -> None:
    """As DeepSeek-V3's release has them: equal ones follow the trunk, others are refused."""
    source, out = tmp_path / "model", tmp_path / "out"
    write_native(source, "deepseek_v3")
    file = source / "model-00003-of-00003.safetensors"
    embedding, copied = "model.embed_tokens.weight", f"model.layers.{LAYERS}.embed_tokens.weight"
    shared = {copied: tensors_of(source)[embedding]}
    head = f"model.layers.{LAYERS}.shared_head.head.weight"
    shared[head] = tensors_of(source)["lm_head.weight"]
    save_file(load_file(file) | shared, file, {"format": "pt"})
    index = json.loads((source / INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(shared, file.name)
    (source / INDEX).write_text(json.dumps(index))
    config = config_of(source, 2, False)
    model = loaded(source, config)
    model.tok_embeddings.weight.mul_(2)
    export_checkpoint(write_run(tmp_path / "run", model, config), out, "same")
    after = tensors_of(out)
    assert torch.equal(after[copied], 2 * shared[copied])
    assert torch.equal(after[copied], after[embedding]) and torch.equal(after[head], shared[head])
    save_file(load_file(file) | {head: shared[head] + 0.5}, file, {"format": "pt"})
    with pytest.raises(
        UserError, match=f"{head} differs from lm_head.weight by up to 0.5; modules share"
    ):
        loaded(source, config)


def damaged(source: Path, **changes: Tensor | None) -> None:
    """Change tensors of the modules' file, or take them out."""
    file = source / "model-00003-of-00003.safetensors"
    native, index = load_file(file), json.loads((source / INDEX).read_text())
    for key, value in changes.items():
        native.pop(key, None)
        index["weight_map"].pop(key, None)
        if value is not None:
            native[key], index["weight_map"][key] = value, file.name
    save_file(native, file, {"format": "pt"})
    (source / INDEX).write_text(json.dumps(index))


PROJ, QUERY = f"model.layers.{LAYERS}.eh_proj.weight", f"model.layers.{LAYERS}.self_attn.q_proj"
EXPERT = f"model.layers.{LAYERS}.mlp.experts.0.up_proj.weight"
DOWN = f"model.layers.{LAYERS}.mlp.experts.2.down_proj.weight"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({PROJ: None}, f"lacks {PROJ}; download it again"),
        ({f"{QUERY}.weight": None}, f"lacks {QUERY}.weight; download it again"),
        ({EXPERT: None}, f"lacks 1 ({EXPERT}); download it again"),
        ({DOWN: None}, f"lacks 1 ({DOWN}); download it again"),
        ({EXPERT: torch.ones(16, 31)}, "mlp.experts.gate_up_proj can't be made of "),
        (
            {PROJ: torch.ones(32, 32)},
            f"{PROJ} has the shape (32, 32), expected (32, 64), as",
        ),
        ({f"{QUERY}.gain": torch.ones(1)}, f"{QUERY}.gain is no part of a module of Glm4MoeFor"),
        (
            {f"{QUERY}.weight": torch.ones(32, 32).to(torch.float8_e4m3fn)},
            f"{QUERY}.weight is of torch.float8_e4m3fn, quantised; take the folder before that",
        ),
    ],
    ids=["projection", "query", "expert", "down", "width", "shape", "unknown", "quantised"],
)
def test_a_module_that_is_not_as_its_contract_says(
    changes: dict[str, Tensor | None], told: str, tmp_path: Path
) -> None:
    source = tmp_path / "model"
    write_native(source, "glm4_moe")
    damaged(source, **changes)
    with pytest.raises(UserError) as error:
        loaded(source, config_of(source, 2, False))
    message = str(error.value)
    assert message.startswith(f"{source}: ") and told in message and "\n" not in message


def test_heads_that_are_no_modules_of_the_folder(tmp_path: Path) -> None:
    write_native(tmp_path / "mimo", "mimo")
    config = config_of(tmp_path / "mimo", 2, False)
    with pytest.raises(
        UserError, match=r"read the trunk's raw state \(mtp.trunk_state\); set it so"
    ):
        loaded(tmp_path / "mimo", config)
    loaded(tmp_path / "mimo", config, ("mtp",))
    write_native(tmp_path / "next", "qwen3_next")
    config = config_of(tmp_path / "next", 3, False)
    run = write_run(tmp_path / "run", loaded(tmp_path / "next", config), config)
    with pytest.raises(UserError, match="has at most 1 module, this model 2"):
        export_checkpoint(run, tmp_path / "out", "same")
    export_checkpoint(run, tmp_path / "out", "same", modules=1)
    change_config(tmp_path / "next", quantization_config={"quant_method": "fp8"})
    with pytest.raises(UserError, match="its weights are quantised"):
        loaded(tmp_path / "next", config)


def test_fewer_and_more_modules_than_heads(tmp_path: Path) -> None:
    """Heads beyond the modules keep their init, modules beyond the heads are left out."""
    source = tmp_path / "model"
    write_native(source, "glm4_moe", 2)
    native = load_file(source / "model-00003-of-00003.safetensors").keys()
    second = {key for key in native if key.startswith(f"model.layers.{LAYERS + 1}.")}
    both = loaded(source, config_of(source, 3, False)).state_dict()
    fewer = loaded(source, config_of(source, 2, False))
    one = fewer.state_dict()
    assert all(torch.equal(both[key], one[key]) for key in one)
    assert set(load_hf_weights(source, fewer, Ranks(alone=True)).unexpected) == second
    more = loaded(source, config_of(source, 4, False))
    three, missing = more.state_dict(), load_hf_weights(source, more, Ranks(alone=True)).missing
    assert all(torch.equal(three[key], both[key]) for key in both)
    assert set(missing) == {key for key in three if key.startswith("mtp.heads.2.")}
