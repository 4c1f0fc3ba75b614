"""From a folder with weights and a config.toml to a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests import formats_run
from torchtitan_mtp.config import JobConfig, to_toml
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats import export_checkpoint
from torchtitan_mtp.inference import generate, load_for_inference, next_logits
from torchtitan_mtp.inference.load import default_dtype
from torchtitan_mtp.models.flavors import model_args
from torchtitan_mtp.models.init import init_weights
from torchtitan_mtp.models.transformer import Transformer, build_model
from torchtitan_mtp.mtp import add_heads


def write_run(folder: Path, heads: str | None = "parallel", step: int = 3) -> Transformer:
    """What a run leaves: config.toml and checkpoint/step-N. Returns the model that was saved."""
    config = JobConfig()
    config.model.flavor = "quickstart"
    if heads is not None:
        config.model.converters = ["mtp"]
        config.mtp.heads = "sequential" if heads == "sequential" else "parallel"
        config.mtp.num_future_tokens = 3
    model = build_model(model_args("llama3", "quickstart", tokenizer_vocab=259))
    if heads is not None:
        add_heads(model, config.mtp)
    model.to_empty(device="cpu")
    init_weights(model, seed=step)
    dcp.save(model.state_dict(), checkpoint_id=folder / "checkpoint" / f"step-{step}", no_dist=True)
    (folder / "config.toml").write_text(to_toml(config))
    return model


@pytest.mark.parametrize("place", ["", "checkpoint", "checkpoint/step-3"])
@pytest.mark.parametrize("heads", ["parallel", "sequential", None])
def test_weights_and_heads_come_back(tmp_path: Path, heads: str | None, place: str) -> None:
    saved = write_run(tmp_path, heads)
    model, tokenizer, config = load_for_inference(tmp_path / place)
    assert config.model.flavor == "quickstart" and tokenizer.vocab_size == 259
    state = model.state_dict()
    assert state.keys() == saved.state_dict().keys()
    assert all(torch.equal(state[name], t) for name, t in saved.state_dict().items())
    assert torch.equal(model.rope_cos, saved.rope_cos)
    assert not any(p.requires_grad for p in model.parameters())
    generation = generate(model, [[256, 65]], 6, speculative=heads is not None)
    assert generation.tokens == generate(saved, [[256, 65]], 6).tokens


@pytest.mark.parametrize("native", [True, False])
def test_what_a_model_decodes_in(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 where a GPU has units for it, and nowhere else."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    found = [default_dtype(torch.device(name)) for name in ("cpu", "cuda")]
    assert found == [torch.float32, torch.bfloat16 if native else torch.float32]


def test_the_latest_step_of_a_run_is_taken(tmp_path: Path) -> None:
    write_run(tmp_path, step=3)
    later = write_run(tmp_path, step=20)
    model, *_ = load_for_inference(tmp_path)
    assert torch.equal(model.norm.weight, later.norm.weight)
    assert torch.equal(model.output.weight, later.output.weight)


def test_weights_are_rounded_to_a_narrower_dtype(tmp_path: Path) -> None:
    saved = write_run(tmp_path)
    model, *_ = load_for_inference(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(model.output.weight, saved.output.weight.bfloat16())
    assert next_logits(model, [1, 2]).dtype == torch.bfloat16


def test_next_logits_are_head_1s(tmp_path: Path) -> None:
    model = write_run(tmp_path)
    logits = next_logits(model, [5, 6, 7])
    assert [int(logits.argmax())] == generate(model, [[5, 6, 7]], 1).tokens[0]


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "run" / "config.toml").unlink()
    with pytest.raises(UserError, match=r"no config\.toml .* job\.dump_folder"):
        load_for_inference(tmp_path / "run")


def test_a_folder_without_checkpoints_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished checkpoint"):
        load_for_inference(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        load_for_inference(tmp_path / "nowhere")


def test_a_name_of_the_hub_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "meta-llama/Llama-3.2-1B"
    with pytest.raises(UserError, match=f"no such folder.*: hf download {name} --local-dir "):
        load_for_inference(name)
    (tmp_path / "outputs").mkdir()
    with pytest.raises(
        UserError, match=r"^outputs/tri: no such folder; .* run's folder, looked for in /.*path$"
    ):
        load_for_inference("outputs/tri")


def test_a_config_of_another_model_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, "parallel")
    config = (tmp_path / "config.toml").read_text()
    (tmp_path / "config.toml").write_text(config.replace('"parallel"', '"sequential"'))
    with pytest.raises(UserError, match="mtp"):
        load_for_inference(tmp_path)
    more = config.replace("num_future_tokens = 3", "num_future_tokens = 4")
    (tmp_path / "config.toml").write_text(more)
    with pytest.raises(UserError, match=r"mtp\.heads\.2"):
        load_for_inference(tmp_path)


def test_a_checkpoint_that_is_no_model_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path)
    dcp.save(
        {"weight": torch.ones(2)}, checkpoint_id=tmp_path / "checkpoint" / "step-9", no_dist=True
    )
    with pytest.raises(UserError, match=r"lacks .* of the model"):
        load_for_inference(tmp_path)


@pytest.mark.parametrize(
    ("format_name", "changes"),
    [
        ("glm4_moe_hf", formats_run.SEQUENTIAL),
        ("llama_hf", {}),
        ("qwen3_hf", formats_run.QWEN),
        ("qwen2_hf", formats_run.QWEN2),
        ("mimo_hf", formats_run.QWEN2 | formats_run.RAW),
    ],
)
def test_a_hugging_face_folder_is_the_model_that_was_exported(
    tmp_path: Path, format_name: str, changes: dict[str, object]
) -> None:
    saved, _ = formats_run.write_run(tmp_path / "run", **(formats_run.SMALL | changes))
    export_checkpoint(tmp_path / "run", tmp_path / "hf", format_name)
    model, tokenizer, config = load_for_inference(tmp_path / "hf")
    assert config.training.seq_len == 64 and tokenizer.vocab_size == 259
    state = saved.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    speculative = generate(model, [[256, 65]], 6, speculative=model.mtp is not None)
    assert speculative.tokens == generate(saved, [[256, 65]], 6).tokens


def test_a_hugging_face_folder_of_an_unknown_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(UserError, match="BertModel"):
        load_for_inference(tmp_path)
