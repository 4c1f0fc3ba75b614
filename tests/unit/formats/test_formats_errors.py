"""What export and import refuse, each in one line, with nothing left behind."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from formats_run import DEEPSEEK, PARALLEL, QWEN, QWEN2, RAW, SEQUENTIAL, SMALL, write_run
from torchtitan_mtp.checkpoint.manifest import read_manifest
from torchtitan_mtp.config import load_toml
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats import export_checkpoint, import_checkpoint
from torchtitan_mtp.formats import exporting as exporting_module
from torchtitan_mtp.formats.formats import FORMATS
from torchtitan_mtp.formats.training import config_of_hf
from torchtitan_mtp.formats.write import written_aside
from torchtitan_mtp.inference import generate, load_for_inference


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """One run, exported to every container."""
    folder = tmp_path_factory.mktemp("formats")
    write_run(folder / "run", **SMALL, **SEQUENTIAL)
    write_run(folder / "parallel", **SMALL, **PARALLEL)
    write_run(folder / "qwen", **QWEN)
    write_run(folder / "qwen2", **QWEN2, **RAW)
    export_checkpoint(folder / "qwen", folder / "mellum", "mellum_hf")
    export_checkpoint(folder / "qwen2", folder / "mimo", "mimo_hf")
    export_checkpoint(folder / "run", folder / "glm", "glm4_moe_hf", max_shard_size=60_000)
    export_checkpoint(folder / "run", folder / "llama", "llama_hf", drop_heads=True)
    export_checkpoint(folder / "parallel", folder / "meta", "meta")
    return folder


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    shutil.copytree(exported, tmp_path / "copy")
    return tmp_path / "copy"


def edit(file: Path, **changes) -> None:
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def edit_tensors(file: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def shard(copy: Path, key: str) -> Path:
    index = json.loads((copy / "glm" / "model.safetensors.index.json").read_text())
    return copy / "glm" / index["weight_map"][key]


def one_tensor(dtype: str, bits: int) -> bytes:
    """A safetensors file of NORM in a dtype that torch may not have."""
    entry = {"dtype": dtype, "shape": [8], "data_offsets": [0, bits]}
    text = json.dumps({NORM: entry}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(bits)


NORM = "model.layers.3.enorm.weight"
GATE = "model.layers.3.mlp.gate.weight"
EXPERT = "model.layers.2.mlp.experts.0.up_proj.weight"
DAMAGES = {
    "no config": (lambda c: (c / "glm/config.json").unlink(), "config.json: missing"),
    "no json": (lambda c: (c / "glm/config.json").write_text("{"), "not readable as JSON"),
    "a list": (lambda c: (c / "glm/config.json").write_text("[]"), "expected a JSON object"),
    "architecture": (
        lambda c: edit(
            c / "glm/config.json", architectures=["GemmaForCausalLM"], model_type="gemma"
        ),
        "GemmaForCausalLM.*not supported here",
    ),
    "another format": (
        lambda c: edit(
            c / "glm/config.json", architectures=["LlamaForCausalLM"], model_type="llama"
        ),
        "use --format llama_hf",
    ),
    "no size": (lambda c: edit(c / "glm/config.json", hidden_size=None), "hidden_size = None"),
    "nested": (
        lambda c: (c / "glm/config.json").write_text("[" * 100_000),
        "config.json: not readable as JSON",
    ),
    "bias": (
        lambda c: edit(c / "glm/config.json", attention_bias=True),
        r"lacks 15 \(model.layers.0.self_attn.q_proj.bias",
    ),
    "mixture": (
        lambda c: edit(c / "glm/config.json", first_k_dense_replace=1),
        "first_k_dense_replace = 1",
    ),
    "rope": (
        lambda c: edit(c / "glm/config.json", rope_parameters={"rope_type": "yarn"}),
        "rope_type = 'yarn'",
    ),
    "partial rope": (
        lambda c: edit(
            c / "glm/config.json", rope_parameters={"partial_rotary_factor": 0.5, "rope_theta": 1e4}
        ),
        "partial_rotary_factor = 0.5",
    ),
    "missing shard": (lambda c: shard(c, NORM).unlink(), "safetensors: missing"),
    "truncated shard": (
        lambda c: shard(c, NORM).write_bytes(shard(c, NORM).read_bytes()[:-100]),
        "not a whole safetensors file",
    ),
    "empty shard": (
        lambda c: shard(c, NORM).write_bytes(b""),
        "empty: copy it, or download it again",
    ),
    "pointing outside": (
        lambda c: edit(
            c / "glm/model.safetensors.index.json", weight_map={NORM: "../run/x.safetensors"}
        ),
        "names the file '../run/x.safetensors'",
    ),
    "empty index": (
        lambda c: edit(c / "glm/model.safetensors.index.json", weight_map={}),
        "no weight_map",
    ),
    "lying index": (
        lambda c: edit_tensors(shard(c, NORM), lambda t: t.pop(NORM)),
        f"says that {NORM} is in",
    ),
    "wrong shape": (
        lambda c: edit_tensors(shard(c, NORM), lambda t: t.update({NORM: torch.ones(31)})),
        rf"{NORM} has shape \(31,\), expected \(32,\)",
    ),
    **{
        str(dtype): (
            lambda c, dtype=dtype: edit_tensors(
                shard(c, NORM), lambda t: t.update({NORM: t[NORM].to(dtype)})
            ),
            f"{NORM} is of {dtype}, expected one of torch.float32",
        )
        for dtype in (torch.int64, torch.bool, torch.float8_e5m2)
    },
    **{
        dtype: (
            lambda c, dtype=dtype, bits=bits: shard(c, NORM).write_bytes(one_tensor(dtype, bits)),
            f"{NORM} is of {dtype}, which torch can't read",
        )
        for dtype, bits in (("F4", 4), ("F6_E2M3", 6))
    },
    "not a number": (
        lambda c: edit_tensors(shard(c, NORM), lambda t: t[NORM][3].fill_(torch.nan)),
        rf"/glm: {NORM} holds nan, which no weight is",
    ),
    "unknown tensor": (
        lambda c: edit_tensors(shard(c, NORM), lambda t: t.update(extra=torch.ones(1))),
        r"holds 1 \(extra\), which have no place",
    ),
    "experts that are used": (
        lambda c: edit_tensors(shard(c, EXPERT), lambda t: t[EXPERT].fill_(1)),
        "is not zero: a mixture of experts",
    ),
    "fewer layers": (
        lambda c: edit(c / "glm/config.json", num_hidden_layers=2, first_k_dense_replace=1),
        "lacks",
    ),
    "more vocabulary": (
        lambda c: edit(c / "glm/config.json", vocab_size=321),
        r"embed_tokens.weight has shape \(320, 32\), expected \(321, 32\)",
    ),
}


HUGE = 10**400
UNFIT = [  # format, key, value, what the message says of them
    *(
        ("glm4_moe_hf", "hidden_size", value, "expected a finite number above 0")
        for value in ("big", float("inf"), float("nan"), True, [1], {}, 0)
    ),
    ("glm4_moe_hf", "hidden_size", 1.5, "expected an integer below 2.31"),
    ("glm4_moe_hf", "hidden_size", 2**31, "expected an integer below 2.31"),
    ("glm4_moe_hf", "num_hidden_layers", 2**30, "expected at most 2000"),
    ("glm4_moe_hf", "num_nextn_predict_layers", 2**30, "expected at most 2000"),
    ("mellum_hf", "num_nextn_predict_layers", 2, "layers = 2 is not supported here, only 1"),
    ("glm4_moe_hf", "rms_norm_eps", HUGE, "expected a finite number above 0"),
    ("glm4_moe_hf", "rope_parameters", [1], r"rope_parameters = \[1\], expected an object"),
    ("glm4_moe_hf", "tie_word_embeddings", "false", "expected true or false"),
    ("glm4_moe_hf", "architectures", 5, "architectures = 5, expected a list of names"),
    ("glm4_moe_hf", "architectures", [5], "expected a list of names"),
    ("glm4_moe_hf", "architectures", "Glm4MoeForCausalLM", "expected a list of names"),
    *(
        ("glm4_moe_hf", "num_nextn_predict_layers", value, "num_nextn_predict_layers = .*expected")
        for value in ("abc", [1], float("inf"), -1, 1.5, True)
    ),
    *(
        ("llama_hf", "rope_parameters", value, "rope_parameters = .*expected an object")
        for value in ([1], 3, "yarn")
    ),
    ("llama_hf", "num_key_value_heads", 3, "n_kv_heads = 3: expected a divisor of n_heads = 4"),
    ("llama_hf", "num_key_value_heads", 8, "n_kv_heads = 8: expected a divisor of n_heads = 4"),
    ("llama_hf", "head_dim", 15, "head_size = 15: expected an even number"),
    ("mellum_hf", "rope_parameters", {"full_attention": 3}, "full_attention = 3, expected an obj"),
    ("llama_hf", "attention_bias", True, "attention_bias = True is not supported here, only False"),
    ("glm4_moe_hf", "attention_bias", 1, "attention_bias = 1, expected true or false"),
    ("mimo_hf", "use_sliding_window", True, "use_sliding_window = True is not supported here"),
    ("mimo_hf", "num_nextn_predict_layers", -1, "expected a finite number of at least 0"),
]


@pytest.mark.parametrize(
    ("name", "key", "value", "message"), UNFIT, ids=[f"{u[1]}-{i}" for i, u in enumerate(UNFIT)]
)
def test_configs_of_other_types(exported: Path, tmp_path: Path, name, key, value, message) -> None:
    config = name.split("_")[0].removesuffix("4")  # glm, llama, mellum, mimo
    values = json.loads((exported / config / "config.json").read_text())
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text(json.dumps(values | {key: value}))
    found = refusal(lambda: import_checkpoint(tmp_path / "x", tmp_path / "back", name))
    assert "config.json: " in found and re.search(message, found), found
    if value is True and "not supported here" in message:  # but transformers runs it
        shutil.copy(exported / config / "model.safetensors", tmp_path / "x")
        assert config_of_hf(tmp_path / "x").model.name == "hf"
        return
    found = refusal(lambda: config_of_hf(tmp_path / "x"))
    assert "config.json: " in found and re.search(message, found), found


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(copy: Path, damage: str) -> None:
    make, message = DAMAGES[damage]
    make(copy)
    found = refusal(lambda: import_checkpoint(copy / "glm", copy / "back", "glm4_moe_hf"))
    assert re.search(message, found), found
    assert not list(copy.glob("back*"))


K_BIAS = "model.mtp_layers.1.self_attn.k_proj.bias"
JOINED = "model.mtp_layers.0.input_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(K_BIAS), rf"lacks 1 \({K_BIAS}\)"),
        (lambda t: t.update({K_BIAS: t[K_BIAS][1:]}), r"k_proj.bias has shape \(15,\), .* \(16,\)"),
        (
            lambda t: t.update({JOINED: t[JOINED][:, :32].contiguous()}),
            r"input_proj.weight has shape \(32, 32\), expected \(32, 64\)",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": torch.zeros(32)}),
            r"holds 1 \(model.layers.0.self_attn.o_proj.bias\), which have no place",
        ),
    ],
    ids=["missing", "shape of a bias", "shape of a projection", "unknown"],
)
def test_damaged_mimo_folders(copy: Path, change, message: str) -> None:
    edit_tensors(copy / "mimo" / "model.safetensors", change)
    found = refusal(lambda: import_checkpoint(copy / "mimo", copy / "back", "mimo_hf"))
    assert re.search(message, found), found
    assert not list(copy.glob("back*"))


def test_a_cap_of_logits_is_not_lost(tmp_path: Path, caplog) -> None:
    """No architecture written here has a key for it; the `torchtitan` format records it."""
    write_run(tmp_path / "run", **SMALL, **{"loss.softcap": 30.0})
    for name in FORMATS.keys() - {"torchtitan"}:
        found = refusal(lambda name=name: export_checkpoint(tmp_path / "run", tmp_path / "x", name))
        assert re.match(rf"--format {name}: no config .* holds loss.softcap = 30.0: .*; ", found)
    assert not list(tmp_path.glob("x*"))
    export_checkpoint(tmp_path / "run", tmp_path / "dcp", "torchtitan")
    assert "TorchTitan's flavor has to have" in caplog.text and "softcap = 30.0" in caplog.text
    assert read_manifest(tmp_path / "dcp").record["softcap"] == 30.0
    config = tmp_path / "run" / "config.toml"
    import_checkpoint(tmp_path / "dcp", tmp_path / "back", "torchtitan", config_file=config)
    assert load_toml(tmp_path / "back" / "config.toml").loss.softcap == 30.0


def test_metas_files(copy: Path) -> None:
    file = copy / "meta" / "consolidated.pth"

    def read() -> str:
        return refusal(lambda: import_checkpoint(copy / "meta", copy / "back", "meta"))

    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "consolidated.pth: can't be read as plain tensors" in read()
    torch.save({"model": object()}, file)
    assert "can't be read as plain tensors" in read()
    torch.save({"a": 1}, file)
    assert "'a': expected a dict of plain tensors by name" in read()
    torch.save([torch.ones(2)], file)
    assert "expected a dict of tensors, found list" in read()
    shutil.copy(file, copy / "meta" / "consolidated.01.pth")
    assert "2 files consolidated*.pth" in read()
    file.unlink()
    (copy / "meta" / "consolidated.01.pth").unlink()
    assert "0 files consolidated*.pth, expected one" in read()
    edit(copy / "meta" / "params.json", n_layers=2)
    assert "n_layers = 2" in read()
    (copy / "meta" / "params.json").unlink()
    assert "params.json: missing" in read()


SQUARE = torch.eye(2)


@pytest.mark.filterwarnings("ignore")  # torch's, of its own kinds of tensors
@pytest.mark.parametrize(
    "state",
    [
        lambda: {1: SQUARE},
        lambda: {"x": SQUARE, ("x", 1): SQUARE},
        lambda: {"x": SQUARE.to_sparse()},
        lambda: {"x": SQUARE.to_sparse_csr()},
        lambda: {"x": SQUARE.to("meta")},
        lambda: {"x": SQUARE.to(torch.complex64)},
        lambda: {"x": torch.quantize_per_tensor(SQUARE, 0.1, 0, torch.qint8)},
        lambda: {"x": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
    ],
    ids=["integer", "tuple", "sparse", "csr", "meta", "complex", "quantized", "nested"],
)
def test_a_pth_of_anything_but_plain_tensors(exported: Path, tmp_path: Path, state) -> None:
    shutil.copy(exported / "meta" / "params.json", tmp_path)
    torch.save(state(), tmp_path / "consolidated.00.pth")
    message = refusal(lambda: import_checkpoint(tmp_path, tmp_path / "out", "meta"))
    assert message.startswith(f"{tmp_path / 'consolidated.00.pth'}: {[*state()][-1]!r}: expected")


# Programs of pickle's machine: pop, memo, reduce, append, tuple, new object, persistent id, text,
# a key that is a dict; all on too little of a stack, or nonsense.
PROGRAMS = [b"0.", b".", b"h\x05.", b"R.", b"(K\x01e.", b"\x87.", b"\x81.", b"K\x01Q."]
PROGRAMS += [b"X\x01\x00\x00\x00\xff.", b"}}K\x01s."]


@pytest.mark.parametrize("program", PROGRAMS, ids=repr)
def test_a_crafted_pth(exported: Path, tmp_path: Path, program: bytes) -> None:
    shutil.copy(exported / "meta" / "params.json", tmp_path)
    torch.save({"x": SQUARE}, tmp_path / "whole")
    file = tmp_path / "consolidated.00.pth"
    with zipfile.ZipFile(tmp_path / "whole") as whole, zipfile.ZipFile(file, "w") as crafted:
        for name in whole.namelist():
            content = b"\x80\x02" + program if name.endswith("data.pkl") else whole.read(name)
            crafted.writestr(name, content)
    message = refusal(lambda: import_checkpoint(tmp_path, tmp_path / "out", "meta"))
    assert f"{file}: can't be read as plain tensors: " in message
    assert "weights_only" not in message  # torch's advice is to run what is in the file


def test_out_of_memory_in_an_export(exported: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(exporting_module, "to_halves", lambda *_: torch.empty(1 << 50))
    message = refusal(lambda: export_checkpoint(exported / "run", tmp_path / "o", "glm4_moe_hf"))
    assert message.startswith("out of memory (can't allocate memory: you tried to allocate 45035")
    assert not list(tmp_path.iterdir())


def test_what_an_export_refuses(exported: Path, tmp_path: Path) -> None:
    run, parallel, out = exported / "run", exported / "parallel", tmp_path / "out"
    message = refusal(lambda: export_checkpoint(run, out, "glm4_hf"))
    assert "did you mean glm4_moe_hf?" in message
    message = refusal(lambda: export_checkpoint(run, exported / "glm", "glm4_moe_hf"))
    assert "is there already" in message
    message = refusal(lambda: export_checkpoint(run, out, "llama_hf"))
    assert "2 sequential heads" in message
    assert message.endswith("; try glm4_moe_hf, or leave them out with --drop_heads")
    message = refusal(lambda: export_checkpoint(parallel, out, "glm4_moe_hf"))
    assert "2 parallel heads" in message
    assert message.endswith("; try meta, or leave them out with --drop_heads")
    assert "takes models with norms" in refusal(lambda: export_checkpoint(run, out, "qwen3_hf"))
    message = refusal(lambda: export_checkpoint(tmp_path / "nowhere", out, "llama_hf"))
    assert "no such folder" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "llama_hf",
            QWEN,
            "with no norms of queries and keys (model.args.qk_norm), this one is "
            "another; try qwen3_hf, glm4_moe_hf, mellum_hf, torchtitan",
        ),
        ("meta", QWEN | PARALLEL, "try qwen3_hf, glm4_moe_hf, mellum_hf, torchtitan with --drop"),
        ("glm4_moe_hf", QWEN | PARALLEL, "trunk; leave them out with --drop_heads"),
        (
            "glm4_moe_hf",
            SMALL | PARALLEL | {"model.args.rope_scaling.factor": 2.0},  # not Meta's
            "trunk; leave them out with --drop_heads",
        ),
        ("mellum_hf", QWEN | SEQUENTIAL, "can't hold the 2 sequential heads"),
        ("meta", SMALL | {"model.args.head_size": 6}, "no head_size"),
        (
            "qwen2_hf",
            SMALL,
            "with biases of queries, keys and values (model.args.qkv_bias), this one is another; "
            "try llama_hf, glm4_moe_hf, meta, torchtitan",
        ),
        (
            "llama_hf",
            QWEN2,
            "with no biases of queries, keys and values (model.args.qkv_bias), this one is "
            "another; try qwen2_hf, glm4_moe_hf, mimo_hf",
        ),
        ("torchtitan", QWEN2, "with no biases"),
        ("mimo_hf", SMALL | RAW, "with biases of queries, keys and values (model.args.qkv_bias)"),
        ("qwen2_hf", QWEN2 | {"model.args.head_size": 12}, "head_size = 12, and Qwen2's heads are"),
        ("llama_hf", QWEN2 | {"model.args.moe.num_experts": 4}, "kind; no format here holds it"),
        (
            "mimo_hf",
            QWEN2 | SEQUENTIAL,
            "its modules read the trunk's raw state, this model's the normalized one "
            "(mtp.trunk_state); try glm4_moe_hf, or leave them out with --drop_heads",
        ),
        (
            "glm4_moe_hf",
            QWEN2 | RAW,
            "its modules read the trunk's normalized state, this model's the raw one "
            "(mtp.trunk_state); try mimo_hf, or leave them out with --drop_heads",
        ),
        ("mellum_hf", QWEN | RAW, "this model's the raw one (mtp.trunk_state); leave them out"),
        ("deepseek_v3_hf", DEEPSEEK | RAW, "this model's the raw one (mtp.trunk_state); leave"),
        ("mimo_hf", QWEN2 | PARALLEL, "can't hold the 2 parallel heads"),
        ("meta", SMALL | {"model.args.rope_scaling.factor": 2.0}, "no rotary scaling"),
        ("llama_hf", SMALL | {"model.hf_assets_path": "/nowhere"}, "no such file or folder"),
    ],
)
def test_models_that_do_not_fit(tmp_path: Path, name: str, changes, message: str) -> None:
    write_run(tmp_path / "run", **changes)
    action = lambda: export_checkpoint(tmp_path / "run", tmp_path / "out", name)  # noqa: E731
    assert message in refusal(action)
    assert not list(tmp_path.glob("out*"))


def test_a_checkpoint_of_another_model_than_its_config(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported / "run", tmp_path / "run")
    config = tmp_path / "run" / "config.toml"
    text = config.read_text()
    out = tmp_path / "out"
    for old, new, message in [
        ("n_layers = 3", "n_layers = 4", "lacks 9 (layers.3."),
        ("n_layers = 3", "n_layers = 2", "holds 9 (layers.2."),
        ("hidden_dim = 48", "hidden_dim = 64", "has shape (48, 32), expected (64, 32)"),
        ("num_future_tokens = 3", "num_future_tokens = 2", "holds 13 (mtp.heads.1."),
    ]:
        assert old in text
        config.write_text(text.replace(old, new))
        assert message in refusal(lambda: export_checkpoint(tmp_path / "run", out, "glm4_moe_hf"))
    config.unlink()
    assert "no config.toml" in refusal(lambda: export_checkpoint(tmp_path / "run", out, "llama_hf"))


def test_torchtitans_folder_needs_a_config(exported: Path, tmp_path: Path) -> None:
    export_checkpoint(exported / "run", tmp_path / "tt", "torchtitan", drop_heads=True)
    action = lambda: import_checkpoint(tmp_path / "tt", tmp_path / "back", "torchtitan")  # noqa: E731
    assert "with --config" in refusal(action)


def test_nothing_is_left_where_writing_ends_early(exported: Path, tmp_path: Path, monkeypatch):
    real, calls = exporting_module.to_halves, []

    def fail_later(tensor, head_dim):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(tensor, head_dim)

    monkeypatch.setattr(exporting_module, "to_halves", fail_later)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(exported / "run", tmp_path / "out", "glm4_moe_hf")
    assert not list(tmp_path.iterdir())


def test_what_reads_back_differently_is_not_kept(exported: Path, tmp_path: Path, monkeypatch):
    real, calls = exporting_module.to_halves, []

    def change(tensor, head_dim):
        calls.append(1)
        return real(tensor, head_dim) + len(calls)

    monkeypatch.setattr(exporting_module, "to_halves", change)
    message = refusal(lambda: export_checkpoint(exported / "run", tmp_path / "o", "glm4_moe_hf"))
    assert "reads back differently" in message
    assert not list(tmp_path.iterdir())


def test_a_leftover_of_a_killed_export_is_no_obstacle(exported: Path, tmp_path: Path) -> None:
    for name in ("out.torchtitan_mtp.tmp", "out.tmp"):  # ours, and a user's
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    export_checkpoint(exported / "run", tmp_path / "out", "glm4_moe_hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.tmp"]
    assert (tmp_path / "out.tmp" / "model.safetensors").read_bytes() == b"half"


def test_folders_above_are_made_and_nothing_is_left_in_them(tmp_path: Path) -> None:
    with pytest.raises(UserError), written_aside(tmp_path / "a/b/out", 0) as folder:
        assert folder.is_dir()
        raise UserError("no")
    with pytest.raises(UserError, match="make room"), written_aside(tmp_path / "a/b/out", 2**60):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b"]
    with written_aside(tmp_path / "a/b/out", 0):
        pass
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out"]


def test_a_tokenizer_with_more_ids_than_rows(copy: Path) -> None:
    file = copy / "llama" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_tokens([f"<{i}>" for i in range(100)])
    tokenizer.save(str(file))  # 259 + 100 ids
    for action in (
        lambda: import_checkpoint(copy / "llama", copy / "out", "llama_hf"),
        lambda: load_for_inference(copy / "llama"),
    ):
        message = refusal(action)
        assert "359 ids" in message and "320 rows" in message
        assert "resize_token_embeddings(359)" in message
    assert not (copy / "out").exists()


@pytest.mark.parametrize("left", ["chat_template.jinja", "special_tokens_map.json", None])
def test_a_model_without_a_tokenizer(copy: Path, caplog, capsys, left: str | None) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / "llama" / name).unlink()
    if left:
        (copy / "llama" / left).write_text("{}")
    import_checkpoint(copy / "llama", copy / "out", "llama_hf")
    config = copy / "out" / "config.toml"
    assert f"no tokenizer; set model.hf_assets_path in {config} to one" in caplog.text
    model, tokenizer, _ = load_for_inference(copy / "out")
    assert generate(model, [[3, 4]], 2, eos_id=tokenizer.eos_ids).tokens[0][1:]  # ids are as good
    assert "model.hf_assets_path" in refusal(lambda: tokenizer.prompt("text"))
    export_checkpoint(copy / "out", copy / "again", "llama_hf")
    assert not list((copy / "again").glob("tokenizer*"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", b'{"a": 0}'),
        ("tokenizer.model", b"\n\x0e\n\x05<unk>\x15"),
        ("spiece.model", b"\n\x0e\n\x05<unk>\x15"),
    ],
)
def test_tokenizers_that_are_not_read(copy: Path, name: str, content: bytes) -> None:
    (copy / "llama" / "tokenizer.json").unlink()
    (copy / "llama" / name).write_bytes(content)
    (copy / "llama" / "merges.txt").write_text("")
    message = refusal(lambda: import_checkpoint(copy / "llama", copy / "out", "llama_hf"))
    assert "AutoTokenizer" in message and "save_pretrained" in message
    assert not (copy / "out").exists()


def test_what_ends_decoding_goes_in_and_out(copy: Path) -> None:
    """From config.json or generation_config.json into the run's folder, and out again."""
    ends = {"bos_token_id": 256, "eos_token_id": [257, 9, 7]}
    edit(copy / "llama" / "generation_config.json", **ends)
    import_checkpoint(copy / "llama", copy / "one", "llama_hf")
    export_checkpoint(copy / "one", copy / "two", "llama_hf")
    (copy / "two" / "generation_config.json").unlink()
    assert json.loads((copy / "two" / "config.json").read_text()).items() >= ends.items()
    import_checkpoint(copy / "two", copy / "three", "llama_hf")
    for place in ("one", "two", "three"):
        _, tokenizer, _ = load_for_inference(copy / place)
        assert (tokenizer.eos_id, tokenizer.eos_ids) == (257, (257, 9, 7))
