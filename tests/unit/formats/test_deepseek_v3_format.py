"""What the DeepSeek-V3 format refuses, and FP8 weights by themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from formats_run import DEEPSEEK, LLAMA_3_1, PARALLEL, SEQUENTIAL, SMALL, write_run
from torchtitan_mtp.checkpoint.state import cast_floating
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats import export_checkpoint, import_checkpoint
from torchtitan_mtp.formats.fp8 import without_quantization
from torchtitan_mtp.formats.read import hf_tensors

FORMAT = "deepseek_v3_hf"


def refusal(action) -> str:
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (FORMAT, SMALL, "another kind; try llama_hf, glm4_moe_hf, meta, torchtitan"),
        ("llama_hf", DEEPSEEK, "another kind; try deepseek_v3_hf, torchtitan"),
        ("glm4_moe_hf", SMALL | {"model.args.moe.num_experts": 4}, "another kind; try torchtitan"),
        ("llama_hf", DEEPSEEK | PARALLEL, "try deepseek_v3_hf, torchtitan with --drop_heads"),
        (FORMAT, DEEPSEEK | PARALLEL, "can't hold the 2 parallel heads"),
        (FORMAT, DEEPSEEK | {"model.args.moe.score_func": "softmax"}, 'score_func = "softmax"'),
        (FORMAT, DEEPSEEK | {"model.args.moe.num_shared_experts": 0}, "no shared expert"),
        (FORMAT, DEEPSEEK | {"model.args.norm_eps": 1e-5}, "norm_eps = 1e-05"),
        (
            FORMAT,
            DEEPSEEK | LLAMA_3_1 | {"model.args.rope_scaling.rope_type": "llama3"},
            "Llama 3.1's rotary scaling",
        ),
        (
            FORMAT,
            DEEPSEEK | SEQUENTIAL | {"model.args.moe.n_dense_layers": 4},
            "dense layers alone",
        ),
    ],
)
def test_models_that_do_not_fit(tmp_path: Path, name: str, changes, message: str) -> None:
    write_run(tmp_path / "run", **changes)
    found = refusal(lambda: export_checkpoint(tmp_path / "run", tmp_path / "out", name))
    assert message in found
    assert not list(tmp_path.glob("out*"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("deepseek")
    write_run(folder / "run", **DEEPSEEK, **SEQUENTIAL)
    export_checkpoint(folder / "run", folder / "hf", FORMAT)
    return folder / "hf"


def edited(exported: Path, to: Path, **changes) -> Path:
    shutil.copytree(exported, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | changes))
    return to


YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method = 'greedy'"),
        ({"rope_interleave": False}, "rope_interleave = False"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05"),
        ({"num_key_value_heads": 1}, "num_key_value_heads = 1"),
        ({"qk_rope_head_dim": 5}, "qk_rope_head_dim = 5: expected an even number"),
        ({"n_group": 4}, "num_expert_groups = 4: expected a divisor of num_experts = 6"),
        ({"rope_parameters": [1]}, "rope_parameters = [1], expected an object"),
        ({"rope_parameters": YARN | {"mscale": "a"}}, "mscale = 'a', expected a finite number"),
        ({"kv_lora_rank": None}, "kv_lora_rank = None"),
        ({"rope_parameters": {"rope_type": "linear"}}, "only 'default' and 'yarn'"),
        ({"rope_parameters": YARN | {"mscale": 1}}, "both mscale and mscale_all_dim"),
        ({"rope_parameters": YARN | {"attention_factor": 1}}, "attention_factor = 1"),
        ({"n_routed_experts": 8}, "lacks"),
        ({"first_k_dense_replace": 0}, "lacks"),
        ({"num_nextn_predict_layers": 1}, "holds"),
    ],
)
def test_folders_that_are_refused(exported: Path, tmp_path: Path, changes, message: str) -> None:
    folder = edited(exported, tmp_path / "hf", **changes)
    assert message in refusal(lambda: import_checkpoint(folder, tmp_path / "run", FORMAT))


def test_half_a_module_is_refused(exported: Path, tmp_path: Path) -> None:
    folder = edited(exported, tmp_path / "hf")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.5.eh_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    message = refusal(lambda: import_checkpoint(folder, tmp_path / "run", FORMAT))
    assert "lacks 1 (model.layers.5.eh_proj.weight)" in message


def test_biases_of_experts_keep_their_type(exported: Path, tmp_path: Path) -> None:
    import_checkpoint(exported, tmp_path / "run", FORMAT, dtype=torch.bfloat16)
    export_checkpoint(tmp_path / "run", tmp_path / "back", FORMAT)
    before, after = (load_file(f / "model.safetensors") for f in (exported, tmp_path / "back"))
    for name, tensor in after.items():
        same = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if same else torch.bfloat16)
        assert torch.equal(tensor, before[name].to(tensor.dtype))
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "bfloat16"
    state = {"layers.1.moe.expert_bias": torch.ones(2), "norm.weight": torch.ones(2)}
    cast = cast_floating(state, torch.bfloat16)  # of a run's last checkpoint
    assert [t.dtype for t in cast.values()] == [torch.float32, torch.bfloat16]


def fp8_folder(folder: Path, block: list[int] | None, scale_shape: tuple[int, int]) -> Path:
    folder.mkdir()
    tensors = {
        "a": torch.randn(5, 7).to(torch.float8_e4m3fn),
        "a_scale_inv": torch.rand(scale_shape) + 0.5,
        "b": torch.randn(3),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {} if block is None else {"quantization_config": {"weight_block_size": block}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("block", "shape"), [([2, 3], (3, 3)), ([5, 7], (1, 1)), (None, (1, 1))])
def test_products_with_the_scales(tmp_path: Path, block, shape) -> None:
    folder = fp8_folder(tmp_path / "x", block, shape)
    stored = load_file(folder / "model.safetensors")
    tensors = without_quantization(hf_tensors(folder))
    assert set(tensors.kinds) == {"a", "b"}
    assert tensors.kinds["a"].dtype == torch.bfloat16
    rows, columns = block or (128, 128)
    for i in range(5):
        for j in range(7):
            scale = stored["a_scale_inv"][i // rows, j // columns]
            assert tensors.read("a")[i, j] == stored["a"].float()[i, j] * scale
    assert torch.equal(tensors.read("b"), stored["b"])


def test_scales_that_do_not_fit(tmp_path: Path) -> None:
    for name, block, shape, expected in (
        ("x", [2, 3], (3, 2), "expected (3, 3)"),
        ("y", [0], (1, 1), "weight_block_size = [0], expected two integers above 0"),
        ("z", [0, 128], (1, 1), "weight_block_size = [0, 128], expected two integers above 0"),
    ):
        folder = fp8_folder(tmp_path / name, block, shape)
        message = refusal(lambda folder=folder: without_quantization(hf_tensors(folder)))
        assert expected in message
    for settings in ([1], "fp8"):
        (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
        message = refusal(lambda: without_quantization(hf_tensors(folder)))
        assert f"quantization_config = {settings!r}, expected an object" in message
    tensors = {"a": torch.ones(5).to(torch.float8_e4m3fn), "a_scale_inv": torch.ones(1)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").unlink()
    message = refusal(lambda: without_quantization(hf_tensors(folder)))
    assert "a (5,) is in FP8, expected a matrix" in message
