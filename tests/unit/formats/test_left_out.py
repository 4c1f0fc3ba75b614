"""Tensors that are left out say what the others say, and every number is finite, whatever reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor

from formats_run import DEEPSEEK, PARALLEL, QWEN, SEQUENTIAL, SMALL, make_model, weights, write_run
from torchtitan_mtp.checkpoint import load_model_weights
from torchtitan_mtp.checkpoint.checkpointer import Checkpointer
from torchtitan_mtp.config import Checkpoint, load_toml
from torchtitan_mtp.data.targets import Batch
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats import export_checkpoint, import_checkpoint
from torchtitan_mtp.formats.training import save_in_hf
from torchtitan_mtp.inference import load_for_inference
from torchtitan_mtp.models.transformer import Transformer

transformers = pytest.importorskip("transformers")

TIED = {"model.args.tied_embeddings": True}
IDS = torch.arange(3, 40)[None]


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def exported(folder: Path, name: str, changes) -> Path:
    write_run(folder / "run", **changes)
    export_checkpoint(folder / "run", folder / "hf", name)
    return folder / "hf"


def both_ways(hf: Path) -> tuple[str, str]:
    """What an import says, and what generate.py says of the folder."""
    found = refusal(lambda: import_checkpoint(hf, hf.with_name("back")))
    assert not list(hf.parent.glob("back*"))
    return found, refusal(lambda: load_for_inference(hf))


def our_logits(model: Transformer) -> Tensor:
    at = torch.arange(IDS.shape[1])[None]
    batch = Batch(IDS, IDS.new_zeros(*IDS.shape, 0), torch.empty(0), at, torch.zeros_like(at))
    return model.output(model(batch)[0])


# ---- what is left out ----


def test_a_head_of_its_own_under_a_tied_flag(tmp_path: Path, caplog) -> None:
    """transformers does not tie then, and computes with the head."""
    hf = exported(tmp_path, "llama_hf", SMALL | TIED)
    head = torch.randn(320, 32, generator=torch.Generator().manual_seed(0))
    edit(hf, lambda t: t.update({"lm_head.weight": head}))
    with torch.no_grad():
        theirs = transformers.LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32)
        expected = theirs.eval()(IDS).logits
        embedding = theirs.model.embed_tokens.weight
        far = (head - embedding).abs().max()
        spec = import_checkpoint(hf, tmp_path / "back")
        assert not spec.args.tied_embeddings
        line = next(r.getMessage() for r in caplog.records if "read as not tied" in r.getMessage())
        assert f"lm_head.weight differs from model.embed_tokens.weight by up to {far:.3g}" in line
        for folder in (hf, tmp_path / "back"):
            model, _, _ = load_for_inference(folder)
            assert torch.equal(model.output.weight, head)
            assert torch.allclose(our_logits(model), expected, atol=1e-5)
    assert not load_toml(tmp_path / "back" / "config.toml").model.args.tied_embeddings


def test_a_copy_of_the_embedding_stays_tied(tmp_path: Path) -> None:
    hf = exported(tmp_path, "llama_hf", SMALL | TIED)
    edit(hf, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert import_checkpoint(hf, tmp_path / "back").args.tied_embeddings


WITH_MODULES = {
    "glm": ("glm4_moe_hf", SMALL | SEQUENTIAL),
    "glm tied": ("glm4_moe_hf", QWEN | SEQUENTIAL | TIED),
    "deepseek": ("deepseek_v3_hf", DEEPSEEK | SEQUENTIAL),
}


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("glm", "embed_tokens.weight"),
        ("glm tied", "shared_head.head.weight"),
        ("deepseek", "shared_head.head.weight"),
        pytest.param("glm", "shared_head.head.weight", marks=pytest.mark.exhaustive),
        pytest.param("glm tied", "embed_tokens.weight", marks=pytest.mark.exhaustive),
        pytest.param("deepseek", "embed_tokens.weight", marks=pytest.mark.exhaustive),
    ],
)
def test_modules_with_tensors_of_their_own(tmp_path: Path, kind: str, own: str) -> None:
    hf = exported(tmp_path, *WITH_MODULES[kind])
    layers = json.loads((hf / "config.json").read_text())["num_hidden_layers"]
    theirs = f"model.layers.{layers + 1}.{own}"
    tied = "lm_head.weight" not in load_file(hf / "model.safetensors")
    of = "model.embed_tokens.weight" if own[0] == "e" or tied else "lm_head.weight"
    edit(hf, lambda t: t.update({theirs: t[of].clone()}))
    import_checkpoint(hf, tmp_path / "same")  # copies, as DeepSeek releases them
    edit(hf, lambda t: t[theirs][7, 3].add_(0.25))
    for message in both_ways(hf):
        assert f"{theirs} differs from {of} by up to 0.25; modules share" in message


@pytest.mark.parametrize("name", ["llama_hf", "meta"])
def test_rotary_frequencies(tmp_path: Path, name: str) -> None:
    hf = exported(tmp_path, name, SMALL)
    theirs = "rope.freqs" if name == "meta" else "model.layers.1.self_attn.rotary_emb.inv_freq"
    for base in (10000.0, 500000.0):
        stored = base ** (-torch.arange(0, 8, 2) / 8)  # Su et al., equation 15
        if name == "meta":
            state = torch.load(hf / "consolidated.pth", weights_only=True)
            torch.save(state | {theirs: stored.half()}, hf / "consolidated.pth")
        else:
            edit(hf, lambda t, stored=stored: t.update({theirs: stored}))
        if base == 10000.0:
            import_checkpoint(hf, tmp_path / "same")
    message = refusal(lambda: import_checkpoint(hf, tmp_path / "back"))
    assert f"{theirs} differs from the rotary frequencies" in message
    assert message.endswith("by rope_theta = 10000")


def test_a_tied_run_with_two_matrices(tmp_path: Path) -> None:
    """A checkpoint of this program's layout whose names say different things."""
    model, _ = write_run(tmp_path / "run", **SMALL | TIED)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["output.weight"] += 0.5
    step = tmp_path / "run" / "checkpoint" / "step-5"
    shutil.rmtree(step)
    dcp.save(state, checkpoint_id=step, no_dist=True)
    toml = tmp_path / "run" / "config.toml"
    for action in (
        lambda: export_checkpoint(tmp_path / "run", tmp_path / "out", "llama_hf"),
        lambda: import_checkpoint(step, tmp_path / "out", "torchtitan", config_file=toml),
    ):
        message = refusal(action)
        assert "output.weight differs from tok_embeddings.weight by up to 0.5" in message
    assert not (tmp_path / "out").exists()


def test_torchtitans_table_of_rotations(tmp_path: Path) -> None:
    """Its early checkpoints hold exp(i * position * frequency); it tells of another rope_theta."""
    model, _ = write_run(tmp_path / "run", **SMALL)
    toml = tmp_path / "run" / "config.toml"
    for base in (10000.0, 500000.0):
        angles = torch.outer(torch.arange(64), base ** (-torch.arange(0, 8, 2) / 8))
        state = model.state_dict() | {"freqs_cis": torch.polar(torch.ones_like(angles), angles)}
        step = tmp_path / f"{base:g}" / "checkpoint" / "step-5"
        dcp.save(state, checkpoint_id=step, no_dist=True)
        shutil.copy(toml, step.parent.parent / "config.toml")
        for action in (
            lambda: import_checkpoint(step, step / "in", "torchtitan", config_file=toml),  # noqa: B023
            lambda: export_checkpoint(step, step / "out", "llama_hf"),  # noqa: B023
            lambda: load_for_inference(step),  # noqa: B023
            lambda: load_model_weights(step, model),  # noqa: B023
        ):
            if base == 10000.0:
                action()
            else:
                message = refusal(action)
                assert "freqs_cis differs from the rotary frequencies" in message
                assert "by rope_theta = 10000" in message
    # Another theta is a way to train for a longer context: it can be asked for.
    load_model_weights(step, model, exclude=["freqs_cis"])
    nested = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    nested["model.freqs_cis"] = torch.full((64, 4), torch.nan, dtype=torch.complex64)
    dcp.save(nested, checkpoint_id=tmp_path / "nested" / "step-5", no_dist=True)
    message = refusal(lambda: load_model_weights(tmp_path / "nested", model))
    assert "model.freqs_cis differs from the rotary frequencies by up to nan" in message


# ---- what is not finite ----


def test_numbers_of_a_folder_that_are_not_finite(tmp_path: Path) -> None:
    hf = exported(tmp_path, "deepseek_v3_hf", DEEPSEEK)
    whole = (hf / "model.safetensors").read_bytes()
    for key, shown, value in (
        ("model.norm.weight", "inf", torch.inf),
        ("model.layers.2.mlp.experts.3.up_proj.weight", "-inf", -torch.inf),
        ("model.layers.0.self_attn.o_proj.weight", "nan", torch.nan),
    ):
        (hf / "model.safetensors").write_bytes(whole)
        edit(hf, lambda t, key=key, value=value: t[key].flatten()[5:6].fill_(value))
        for message in both_ways(hf):
            assert f"{key} holds {shown}, which no weight is" in message


def test_numbers_that_a_narrower_type_can_not_hold(tmp_path: Path) -> None:
    """float16 ends at 65504; bfloat16 at 3.39e38, below float32's 3.403e38."""
    model, _ = write_run(tmp_path / "run", **SMALL)
    for key, value, dtype, shown in (
        ("layers.1.feed_forward.w2.weight", 70000.0, torch.float16, "70000"),
        ("norm.weight", -3.4e38, torch.bfloat16, "-3.4e+38"),
    ):
        folder = tmp_path / shown
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state[key].flatten()[2:3].fill_(value)
        dcp.save(state, checkpoint_id=folder / "checkpoint" / "step-5", no_dist=True)
        shutil.copy(tmp_path / "run" / "config.toml", folder / "config.toml")
        expected = f"holds {shown}, which {dtype} can't hold; choose a wider one"
        export_checkpoint(folder, folder / "hf", "llama_hf")
        for action in (
            lambda: export_checkpoint(folder, folder / "out", "llama_hf", dtype=dtype),  # noqa: B023
            lambda: load_for_inference(folder, dtype=dtype),  # noqa: B023
            lambda: load_for_inference(folder / "hf", dtype=dtype),  # noqa: B023
            lambda: import_checkpoint(folder / "hf", folder / "out", dtype=dtype),  # noqa: B023
        ):
            message = refusal(action)
            assert expected in message and not (folder / "out").exists()
        assert key in refusal(lambda: load_for_inference(folder, dtype=dtype))  # noqa: B023
        export_checkpoint(folder, folder / "fits", "llama_hf", dtype=torch.float32)


def test_blocks_of_fp8_that_are_not_finite(tmp_path: Path) -> None:
    """e4m3fn has one NaN a sign and no infinity; a scale can be either."""
    hf = exported(tmp_path, "deepseek_v3_hf", DEEPSEEK)
    key = "model.layers.1.self_attn.o_proj.weight"

    def quantize(t: dict, weight: float = 1.0, scale: float = 1.0) -> None:
        t[key] = torch.full(t[key].shape, weight).to(torch.float8_e4m3fn)
        t[f"{key}_scale_inv"] = torch.full((1, 1), scale)

    edit(hf, quantize)
    import_checkpoint(hf, tmp_path / "fine")
    for change, shown in (
        (lambda t: quantize(t, weight=torch.nan), "nan, which no weight is"),
        (lambda t: quantize(t, scale=torch.inf), "inf, which no weight is"),
        (lambda t: quantize(t, weight=448.0, scale=1e37), "inf, which no weight is"),
        (lambda t: quantize(t, weight=3.25, scale=1.046e38), "which torch.bfloat16 can't hold"),
    ):
        edit(hf, change)
        message = refusal(lambda: import_checkpoint(hf, tmp_path / "back"))
        assert f"{key} holds " in message and shown in message, message


def test_a_last_save_keeps_what_its_type_can_not_hold(tmp_path: Path, caplog) -> None:
    """The end of a training must not be lost: it is saved as it was trained."""
    model, config = write_run(tmp_path / "run", **SMALL | PARALLEL)
    model.norm.weight[3] = 70000.0
    settings = Checkpoint(enable=True, last_save_model_only=True, export_dtype="float16")
    saver = Checkpointer(settings, tmp_path / "run", model)
    assert saver.save(9, last=True)
    saver.close()
    assert "norm.weight holds 70000, which torch.float16 can't hold" in caplog.text
    found = weights(tmp_path / "run" / "checkpoint" / "step-9", config)
    assert torch.equal(found["norm.weight"], model.norm.weight)
    assert make_model(config).norm.weight.dtype == torch.float32


def test_a_last_folder_keeps_what_its_type_can_not_hold(tmp_path: Path, caplog) -> None:
    """step-N.hf, after a step that was saved as it was trained for the same reason."""
    model, _ = write_run(tmp_path / "run", **SMALL)
    model.norm.weight[3] = 70000.0
    step = tmp_path / "run" / "checkpoint" / "step-9"
    dcp.save(model.state_dict(), checkpoint_id=step, no_dist=True)
    out = save_in_hf(step, model, torch.float16)
    found = load_file(out / "model.safetensors")["model.norm.weight"]
    assert torch.equal(found, model.norm.weight) and found.dtype == torch.float32
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    assert "norm.weight holds 70000, which torch.float16 can't hold" in caplog.text
