"""Formats: every tensor finds its place and comes back to the bit, at little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from formats_run import (
    DEEPSEEK,
    LLAMA_3_1,
    PARALLEL,
    PLAIN_QUERIES,
    QWEN,
    QWEN2,
    RAW,
    SEQUENTIAL,
    SMALL,
    YARN,
    weights,
    write_run,
)
from torchtitan_mtp.checkpoint import find_checkpoint
from torchtitan_mtp.checkpoint.folders import kind_of
from torchtitan_mtp.checkpoint.manifest import read_manifest
from torchtitan_mtp.config import load_toml
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats import FORMATS, export_checkpoint, import_checkpoint
from torchtitan_mtp.formats.names import swap_halves, to_halves, to_pairs
from torchtitan_mtp.formats.read import Kind, Tensors
from torchtitan_mtp.formats.training import hf_format
from torchtitan_mtp.formats.write import write_safetensors
from torchtitan_mtp.inference import generate, load_for_inference
from torchtitan_mtp.models.args import ModelArgs, ModelSpec, YaRN
from torchtitan_mtp.models.flavors import flavors

TIED = {"model.args.tied_embeddings": True}
BOTH = QWEN | {"model.args.qkv_bias": True}
SHARED = {"mtp.share_weights": True}
CASES = {
    "llama_hf": [SMALL, SMALL | LLAMA_3_1 | TIED, SMALL | {"model.args.head_size": 6}],
    "qwen2_hf": [QWEN2, QWEN2 | LLAMA_3_1 | TIED],
    "qwen3_hf": [QWEN, QWEN | TIED],
    "glm4_moe_hf": [SMALL | SEQUENTIAL, QWEN | SEQUENTIAL | TIED, SMALL, QWEN2 | SEQUENTIAL, BOTH],
    "mimo_hf": [QWEN2 | RAW, QWEN2 | RAW | TIED | {"mtp.num_future_tokens": 2}, QWEN2],
    "mellum_hf": [QWEN | SEQUENTIAL | {"mtp.num_future_tokens": 2}, QWEN | LLAMA_3_1],
    "meta": [SMALL | PARALLEL, SMALL | PARALLEL | {"mtp.match_parameters": True}, SMALL],
    "deepseek_v3_hf": [DEEPSEEK | SEQUENTIAL, DEEPSEEK | PLAIN_QUERIES | YARN | TIED],
    "torchtitan": [SMALL, QWEN, SMALL | TIED, DEEPSEEK],
}


def test_every_format_is_tested():
    assert {*CASES, "medusa"} == FORMATS.keys()  # of heads alone, which are not imported


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param(name, changes, id=f"{name}-{i}")
        for name, cases in CASES.items()
        for i, changes in enumerate(cases)
    ],
)
def test_there_and_back_to_the_bit(tmp_path: Path, name: str, changes) -> None:
    saved, config = write_run(tmp_path / "run", **changes)
    export_checkpoint(tmp_path / "run", tmp_path / "out", name, max_shard_size=20_000)
    file = tmp_path / "run" / "config.toml" if name == "torchtitan" else None
    spec = import_checkpoint(tmp_path / "out", tmp_path / "back", name, config_file=file)
    again = load_toml(tmp_path / "back" / "config.toml")
    found, expected = weights(tmp_path / "back", again), saved.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    # The model is the same in what weights don't say, too.
    assert vars(spec.args) | {"n_layers": 0} == vars(saved.args) | {
        "n_layers": 0,
        "hidden_dim": spec.args.hidden_dim,
        "multiple_of": spec.args.multiple_of,
        "ffn_dim_multiplier": spec.args.ffn_dim_multiplier,
        "max_seq_len": 4096 if name == "meta" else 64,
    }
    assert spec.args.ffn_dim == saved.args.ffn_dim == 48
    path = find_checkpoint(tmp_path / "back")
    assert (path.name, kind_of(path)) == ("step-0", "model_only")
    ours, _, _ = load_for_inference(tmp_path / "back")
    assert again.mtp.num_future_tokens == config.mtp.num_future_tokens or not ours.mtp
    assert again.mtp.trunk_state == config.mtp.trunk_state
    kept, _, _ = load_for_inference(tmp_path / "run")
    tokens = [generate(model, [[1, 2, 3]], 8).tokens for model in (ours, kept)]
    assert tokens[0] == tokens[1]


def test_shared_weights_are_one_module(tmp_path: Path) -> None:
    saved, _ = write_run(tmp_path / "run", **SMALL, **SEQUENTIAL, **SHARED)
    export_checkpoint(tmp_path / "run", tmp_path / "out", "glm4_moe_hf")
    assert json.loads((tmp_path / "out/config.json").read_text())["num_nextn_predict_layers"] == 1
    spec = import_checkpoint(tmp_path / "out", tmp_path / "back", "glm4_moe_hf")
    assert spec.num_future_tokens == 2  # one module is all that the format says
    found = weights(tmp_path / "back", load_toml(tmp_path / "back" / "config.toml"))
    assert all(torch.equal(found[k], t) for k, t in saved.state_dict().items())


def test_rotary_layouts_against_the_definition():
    x = torch.arange(2 * 6 * 3).view(12, 3)  # two heads of six
    halves = to_halves(x, 6)
    for head in range(2):
        for j in range(3):  # pair j: elements 2j and 2j + 1, or j and j + 3
            assert torch.equal(halves[6 * head + j], x[6 * head + 2 * j])
            assert torch.equal(halves[6 * head + 3 + j], x[6 * head + 2 * j + 1])
    assert torch.equal(to_pairs(halves, 6), x)
    scale = torch.arange(6)  # a norm's, one for all heads
    assert to_halves(scale, 6).tolist() == [0, 2, 4, 1, 3, 5]
    assert to_halves(torch.arange(12), 6).tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]  # bias


def test_swapped_halves_against_the_definition():
    x = torch.arange(3 * 8).view(3, 8)
    assert torch.equal(swap_halves(x), torch.cat((x[:, 4:], x[:, :4]), dim=1))
    assert torch.equal(swap_halves(swap_halves(x)), x)


def test_what_a_training_leaves() -> None:
    """The format of `checkpoint.last_save_in_hf`."""
    shape = ModelArgs(dim=32, n_heads=4, n_layers=2, vocab_size=320, hidden_dim=48)
    biased = replace(shape, qkv_bias=True)
    raw = ModelSpec(biased, "sequential", 3, trunk_state="raw")
    assert hf_format(ModelSpec(shape)) == "llama_hf"
    assert hf_format(ModelSpec(biased)) == "qwen2_hf"
    assert hf_format(ModelSpec(replace(shape, qk_norm=True))) == "qwen3_hf"
    assert hf_format(ModelSpec(replace(biased, qk_norm=True))) == "glm4_moe_hf"
    assert hf_format(ModelSpec(shape, "sequential", 3)) == "glm4_moe_hf"
    assert hf_format(ModelSpec(biased, "sequential", 3)) == "glm4_moe_hf"
    assert hf_format(ModelSpec(replace(shape, qk_norm=True), "sequential", 2)) == "glm4_moe_hf"
    assert hf_format(raw) == "mimo_hf"
    with pytest.raises(
        UserError, match=r"mimo_hf: takes models with biases .*model\.args\.qkv_bias"
    ):
        hf_format(replace(raw, args=shape))
    with pytest.raises(UserError, match="glm4_moe_hf: can't hold the 2 medusa heads"):
        hf_format(ModelSpec(shape, "medusa", 3))  # `medusa` would leave the trunk out
    for heads in ("parallel", "medusa"):
        with pytest.raises(UserError, match=rf"glm4_moe_hf: can't hold the 2 {heads} heads"):
            hf_format(ModelSpec(shape, heads, 3))
    with pytest.raises(UserError, match="YaRN is written for DeepSeek's models only"):
        hf_format(ModelSpec(replace(shape, rope_scaling=YaRN())))
    with pytest.raises(UserError, match="head_size = 16, and Qwen2's heads are 32 / 4 wide"):
        hf_format(replace(raw, args=replace(biased, head_size=16)))


def test_shards_and_their_index(tmp_path: Path) -> None:
    write_run(tmp_path / "run", **SMALL, **SEQUENTIAL)
    export_checkpoint(tmp_path / "run", tmp_path / "out", "glm4_moe_hf", max_shard_size=50_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    stored = {key: file.name for file in files for key in load_file(file)}
    assert index["weight_map"] == stored and len(files) > 3
    assert any(key.startswith("model.layers.4.") for key in stored)  # the second module
    sizes = [sum(t.nbytes for t in load_file(file).values()) for file in files]
    assert max(sizes) <= 50_000 and sum(sizes) == index["metadata"]["total_size"]
    assert all(b'"__metadata__":{"format":"pt"}' in file.read_bytes() for file in files)


def test_a_shard_of_mixed_types_is_aligned(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.randn(3).bfloat16(),
        "wide": torch.randn(5),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
    }
    write_safetensors(
        tmp_path,
        Tensors(
            tmp_path, {k: Kind(t.shape, t.dtype) for k, t in tensors.items()}, tensors.__getitem__
        ),
        10**9,
    )
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[k], t) and found[k].dtype == t.dtype for k, t in tensors.items())


@pytest.mark.parametrize("name", ["glm4_moe_hf", "meta"])
def test_a_type_is_rounded_to_once(tmp_path: Path, name: str) -> None:
    heads = PARALLEL if name == "meta" else SEQUENTIAL
    saved, _ = write_run(tmp_path / "run", **SMALL, **heads)
    export_checkpoint(tmp_path / "run", tmp_path / "out", name, dtype=torch.bfloat16)
    import_checkpoint(tmp_path / "out", tmp_path / "back", name, dtype=torch.float32)
    found = weights(tmp_path / "back", load_toml(tmp_path / "back" / "config.toml"))
    for key, tensor in saved.state_dict().items():
        assert torch.equal(found[key], tensor.bfloat16().float())
    if name == "glm4_moe_hf":
        assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_metas_file_is_plain_tensors(tmp_path: Path) -> None:
    saved, _ = write_run(tmp_path / "run", **SMALL, **PARALLEL)
    export_checkpoint(tmp_path / "run", tmp_path / "out", "meta")
    state = torch.load(tmp_path / "out" / "consolidated.pth", weights_only=True)  # as a whole
    head = saved.mtp.heads[1].attention.wq.weight
    assert torch.equal(state["extra_heads.1.attention.wq.weight"], head)
    assert len(state) == len(saved.state_dict())
    params = json.loads((tmp_path / "out" / "params.json").read_text())
    assert (params["n_layers"], params["n_future_tokens"]) == (5, 3)
    hidden = int(params["ffn_dim_multiplier"] * int(2 * 4 * params["dim"] / 3))  # Meta's rule
    rounded = params["multiple_of"] * -(-hidden // params["multiple_of"])
    assert rounded == 48


def test_a_named_flavor_is_recognised(tmp_path: Path) -> None:
    write_run(tmp_path / "run", **{"model.flavor": "quickstart"})
    export_checkpoint(tmp_path / "run", tmp_path / "out", "llama_hf")
    import_checkpoint(tmp_path / "out", tmp_path / "back", "llama_hf")
    model = load_toml(tmp_path / "back" / "config.toml").model
    assert (model.name, model.flavor, model.vocab_size) == ("llama3", "quickstart", 320)
    assert model.args.given() == {} and "quickstart" in flavors["llama3"]


def test_heads_are_dropped_when_asked_and_named(tmp_path: Path, caplog) -> None:
    saved, _ = write_run(tmp_path / "run", **SMALL, **PARALLEL)
    with caplog.at_level("WARNING", logger="torchtitan_mtp"):
        export_checkpoint(tmp_path / "run", tmp_path / "out", "llama_hf", drop_heads=True)
    dropped = [record.getMessage() for record in caplog.records if "dropped" in record.msg]
    assert [line.split(":")[0] for line in dropped] == [
        "dropped mtp.heads.0",
        "dropped mtp.heads.1",
    ]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    trunk = [name for name in saved.state_dict() if not name.startswith("mtp.")]
    assert len(stored) == len(trunk)


def test_the_manifest_is_verified_before_anything_is_written(tmp_path: Path) -> None:
    write_run(tmp_path / "run", **SMALL)
    export_checkpoint(tmp_path / "run", tmp_path / "tt", "torchtitan")
    manifest = read_manifest(tmp_path / "tt")
    assert manifest is not None and (manifest.step, manifest.kind) == (0, "model_only")


MEMORY = """
import resource, sys
from pathlib import Path
import torch
from torchtitan_mtp.formats.read import Kind, Tensors, dcp_tensors
from torchtitan_mtp.formats.write import write_dcp, write_safetensors

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

out = Path(sys.argv[1])
kinds = {f"t{i}": Kind(torch.Size([4 * 2**20]), torch.float32) for i in range(16)}
tensors = Tensors(out, kinds, lambda name: torch.ones(4 * 2**20))  # 16 MiB
write_safetensors(out, Tensors(out, {"t0": kinds["t0"]}, tensors.read), 10**9)
before = peak()
write_safetensors(out, tensors, 128 * 2**20)
print("safetensors", peak() - before)
write_dcp(out / "dcp", tensors, {})
print("dcp", peak() - before)
source = dcp_tensors(out / "dcp")
for name in source.kinds:
    source.read(name)
print("reading dcp", peak() - before)
"""


def test_memory_is_a_tensors_not_a_models(tmp_path: Path) -> None:
    """256 MiB of tensors, 16 MiB each: a few of them at a time."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    grown = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    assert list(grown) == ["safetensors", "dcp", "reading dcp"]
    assert all(int(kib) < 160 * 1024 for kib in grown.values()), grown
