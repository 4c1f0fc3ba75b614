"""The `medusa` format: the heads that vLLM's Medusa speculator reads, computed as it does."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from formats_run import (
    DEEPSEEK,
    LLAMA_3_1,
    PARALLEL,
    QWEN,
    QWEN2,
    SEQUENTIAL,
    SMALL,
    write_run,
)
from torchtitan_mtp.data.targets import Batch
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats import export_checkpoint, import_checkpoint
from torchtitan_mtp.formats.training import config_of_hf
from torchtitan_mtp.mtp.medusa import MedusaHead

transformers = pytest.importorskip("transformers")

MEDUSA = PARALLEL | {"mtp.heads": "medusa"}
TIED = {"model.args.tied_embeddings": True}


@pytest.fixture(autouse=True)
def trained(monkeypatch):
    """Heads whose layers are not zero, as if they had been trained."""
    monkeypatch.setattr(MedusaHead, "init_std", lambda self, name: 0.2)


def logits_in_vllm(folder: Path, hidden: Tensor) -> list[Tensor]:
    """Each head's logits from the trunk's states.

    By vllm-project/vllm@09cddad8f0324594022359cd2b07e962a14b895f, model_executor/models/medusa.py
    (`ResidualBlock`, `Medusa`) and transformers_utils/configs/medusa.py; the formulas, names and
    keys are those of vLLM 0.32.0. It ignores tensors whose names it has not; here none may be.
    """
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("medusa", ["MedusaModel"])
    assert config["original_lm_head"] and not config["medusa_fc_bias"]
    assert not {"truncated_vocab_size", "logit_scale"} & config.keys()
    heads, layers = range(config["num_heads"]), range(config["num_hidden_layers"])
    state = load_file(folder / "model.safetensors")
    names = {f"blocks.{i}.layers.{j}.weight" for i in heads for j in layers}
    assert state.keys() == names | {"lm_head.weight"}
    assert state["lm_head.weight"].shape == (config["vocab_size"], config["hidden_size"])
    logits = []
    for i in heads:
        x = hidden
        for j in layers:
            y = x @ state[f"blocks.{i}.layers.{j}.weight"].T
            x = x + y / (1 + torch.exp(-y))
        logits.append(x @ state["lm_head.weight"].T)
    return logits


@pytest.mark.parametrize(
    ("trunk", "changes"),
    [
        ("llama_hf", SMALL),
        ("llama_hf", SMALL | TIED | LLAMA_3_1),
        ("qwen2_hf", QWEN2),
        ("qwen3_hf", QWEN),
        ("deepseek_v3_hf", DEEPSEEK),
    ],
    ids=["llama", "tied", "qwen2", "qwen3", "deepseek_v3"],
)
def test_vllm_computes_our_heads(tmp_path: Path, caplog, trunk: str, changes) -> None:
    """From both exports, as it does: the trunk's states after its final norm (transformers' of the
    one folder), and the heads on them (from the other)."""
    ours, _ = write_run(tmp_path / "run", **changes, **MEDUSA)
    export_checkpoint(tmp_path / "run", tmp_path / "trunk", trunk, drop_heads=True)
    with caplog.at_level(logging.WARNING, logger="torchtitan_mtp"):
        export_checkpoint(tmp_path / "run", tmp_path / "heads", "medusa")
    assert "another --format with --drop_heads writes the model" in caplog.text
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "trunk").eval()
    with torch.no_grad():
        found = logits_in_vllm(tmp_path / "heads", model.model(ids).last_hidden_state)
    at = torch.arange(24).expand(2, 24)
    batch = Batch(ids, ids.new_zeros(2, 24, 2), torch.empty(0), at, torch.zeros_like(at))
    first, *expected = (ours.output(h) for h in ours(batch))
    assert len(found) == len(expected) == 2
    assert (expected[0] - first).std() > 0.1 and (expected[1] - expected[0]).std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("changes", [SMALL, SMALL | TIED], ids=["two matrices", "tied"])
def test_tensors_are_ours_to_the_bit(tmp_path: Path, changes) -> None:
    ours, _ = write_run(tmp_path / "run", **changes, **MEDUSA)
    export_checkpoint(tmp_path / "run", tmp_path / "two", "medusa")
    export_checkpoint(tmp_path / "run", tmp_path / "one", "medusa", modules=1)
    state = ours.state_dict()
    expected = {
        "lm_head.weight": state["output.weight"],
        "blocks.0.layers.0.weight": state["mtp.heads.0.linear.weight"],
        "blocks.1.layers.0.weight": state["mtp.heads.1.linear.weight"],
    }
    for folder, count in (("two", 2), ("one", 1)):
        found = load_file(tmp_path / folder / "model.safetensors")
        assert found.keys() == {*list(expected)[: count + 1]}
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert (config["num_heads"], config["num_hidden_layers"]) == (count, 1)


@pytest.mark.parametrize(
    ("heads", "options", "told"),
    [
        (SEQUENTIAL, {}, "can't hold the 2 sequential heads .*; try glm4_moe_hf"),
        (PARALLEL, {}, "can't hold the 2 parallel heads .*; try meta"),
        ({}, {}, 'heads of mtp.heads = "medusa" alone, and this model has none; try llama_hf'),
        (SEQUENTIAL, {"drop_heads": True}, "can't hold the 2 sequential heads"),
        (MEDUSA, {"modules": 3}, "--modules 3: the model has 2"),
    ],
    ids=["sequential", "parallel", "none", "dropped", "too many"],
)
def test_what_it_is_not_for(tmp_path: Path, heads, options, told: str) -> None:
    write_run(tmp_path / "run", **SMALL, **heads)
    with pytest.raises(UserError, match=told):
        export_checkpoint(tmp_path / "run", tmp_path / "out", "medusa", **options)
    assert not (tmp_path / "out").exists()


def test_both_formats_are_named_where_the_trunks_is_another(tmp_path: Path) -> None:
    write_run(tmp_path / "run", **QWEN, **MEDUSA)
    with pytest.raises(UserError, match=r"try medusa, or try qwen3_hf, .* with --drop_heads"):
        export_checkpoint(tmp_path / "run", tmp_path / "out", "llama_hf", drop_heads=True)


def test_heads_alone_are_not_imported(tmp_path: Path) -> None:
    write_run(tmp_path / "run", **SMALL, **MEDUSA)
    export_checkpoint(tmp_path / "run", tmp_path / "heads", "medusa")
    told = r"config\.json: MedusaModel holds heads alone, expected a whole model; import"
    for name in ("medusa", None):
        with pytest.raises(UserError, match=told):
            import_checkpoint(tmp_path / "heads", tmp_path / "out", name)
    with pytest.raises(UserError, match=told):
        config_of_hf(tmp_path / "heads")
