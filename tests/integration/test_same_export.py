"""A model of transformers trained and put back into its folder: what training left alone stays as
it was, and engines find in the rest what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hf_folders import write_folder
from native_folders import ALL, LAYERS, RELEASED, tensors_of, write_native
from runs import Run, config_of, train
from test_export import count_drafts, load, tokens
from torchtitan_mtp.cli.export_checkpoint import main as export_command
from torchtitan_mtp.data.targets import Batch
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.trainer import Trainer

WEIGHTS = ".safetensors"
NATIVE, INDEX = "model-00003-of-00003.safetensors", "model.safetensors.index.json"


def keys_of(source: Path, n: int = 2, **changes: Any) -> dict[str, Any]:
    keys: dict[str, Any] = {"model.name": "hf", "model.hf_assets_path": str(source)}
    keys |= {"mtp.heads": "sequential", "mtp.num_future_tokens": n, "training.steps": 2}
    keys |= {"checkpoint.enable": True, "checkpoint.initial_load_in_hf": True, "optimizer.lr": 1e-2}
    return keys | changes


def frozen(source: Path, n: int = 2, **changes: Any) -> dict[str, Any]:
    return keys_of(source, n, **{"mtp.train": "heads"} | changes)


def opened(folder: Path, name: str, modules: int, monkeypatch: Any) -> Any:
    """transformers' model of a folder, whose modules transformers then finds."""
    if not RELEASED[name].block.startswith("mtp."):  # it knows the layers of released depths alone
        cls = getattr(transformers, RELEASED[name].architecture)
        patterns = [rf"model\.layers\.{LAYERS + k}\." for k in range(modules)]
        monkeypatch.setattr(cls, "_keys_to_ignore_on_load_unexpected", patterns)
    model, _ = load(folder)
    if name.startswith("qwen"):
        model.config.num_mtp_layers, model.config.mtp_layer_types = modules, ["full_attention"]
    return model


def drafts_equal(folder: Path, name: str, modules: int, run: Run, monkeypatch: Any) -> None:
    """transformers' own MTP model on the folder drafts what our heads predict."""
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    theirs = opened(folder, name, modules, monkeypatch)
    ids = tokens(21)
    size = 21 - modules
    at = torch.arange(size).unsqueeze(0)
    future = torch.stack([ids[:, k : k + size] for k in range(1, modules + 1)], -1)
    batch = Batch(ids[:, :size], future, torch.empty(0), at, torch.zeros_like(at))
    ours = run.model
    with torch.no_grad():
        hiddens = ours(batch)
        module = MtpModel.from_pretrained(theirs)
        cache = MtpCache(config=theirs.config.get_mtp_config())
        h = theirs(ids[:, :size], output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(h, hiddens[0], rtol=0, atol=2e-5)
        for k in range(modules):
            inputs = ids[:, k + 1 : k + 1 + size]
            h = module.forward_layer(k, h, at, cache, input_ids=inputs)
            torch.testing.assert_close(h, hiddens[k + 1], rtol=0, atol=2e-5)
            drafts, greedy = theirs.lm_head(h).argmax(-1), ours.output.argmax([hiddens[k + 1]])
            assert torch.equal(drafts, greedy[..., 0])
    if theirs._is_stateful:  # it can't take drafts back there
        return
    sizes = count_drafts(theirs)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    plain = theirs.generate(ids, **options)
    sizes.clear()
    assert torch.equal(theirs.generate(ids, use_mtp=True, **options), plain)
    assert max(sizes[1:]) == modules + 1  # it did draft


def trained(config: Any) -> Run:
    """A run, and the model that it ended with."""
    kept: list[Trainer] = []
    run = train(config, kept.append)
    run.model = kept[0].model
    return run


@pytest.mark.parametrize("name", ALL)
def test_modules_trained_on_a_frozen_trunk(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    source, out = tmp_path / "model", tmp_path / "run" / "checkpoint" / "step-2.hf"
    modules = ALL[name].modules
    write_native(source, name, modules)
    keys = frozen(source, modules + 1, **{"checkpoint.last_save_in_hf": True})
    keys |= {"mtp.trunk_state": "raw"} if name == "mimo" else {}
    run = trained(config_of(tmp_path, keys))
    for file in source.iterdir():
        same = (out / file.name).read_bytes() == file.read_bytes()
        assert same == (file.name != NATIVE), file.name
        if file.suffix == ".safetensors" and same:
            assert file.samefile(out / file.name)  # takes no room
    before, after = load_file(source / NATIVE), load_file(out / NATIVE)
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    still = {key for key in before if key not in changed}
    alone = ("e_score_correction_bias", ".indexer.")  # have no gradient
    assert all(any(part in key for part in alone) for key in still), still
    if name in RELEASED and name != "mimo":
        drafts_equal(out, name, modules, run, monkeypatch)


def test_a_trunk_and_its_modules_trained_together(tmp_path: Path, monkeypatch: Any) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    write_native(source, "deepseek_v3", 1, torch.bfloat16)
    keys = keys_of(source)
    run = trained(config_of(tmp_path, keys))
    moved = tmp_path / "moved"
    source.rename(moved)
    command = [str(tmp_path / "run"), str(out), "--format", "same"]
    assert export_command(command) == 1
    assert export_command([*command, "--from", str(moved)]) == 0
    before, after = tensors_of(moved), tensors_of(out)
    assert {k: (t.shape, t.dtype) for k, t in before.items()} == {
        k: (t.shape, t.dtype) for k, t in after.items()
    }
    norm = run.weights["model.norm.weight"]
    assert torch.equal(after["model.norm.weight"], norm.bfloat16())
    assert not torch.equal(after["model.norm.weight"], before["model.norm.weight"])
    with torch.no_grad():
        for param in run.model.parameters():
            param.copy_(param.bfloat16())
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", widened())
    drafts_equal(out, "deepseek_v3", 1, run, monkeypatch)


def widened() -> Any:
    """from_pretrained in float32."""
    from_pretrained = transformers.AutoModelForCausalLM.from_pretrained
    return lambda *args, **options: from_pretrained(*args, **{"dtype": torch.float32} | options)


def test_a_run_in_its_models_read_only_folder(tmp_path: Path) -> None:
    """Others' permissions are not copied, nor the run itself; numbers that are no weights are."""
    source = tmp_path / "model"
    write_native(source, "glm4_moe")
    held = load_file(source / NATIVE) | {"ids": torch.arange(3), "mask": torch.tensor([True])}
    save_file(held, source / NATIVE, {"format": "pt"})
    (source / "figures").mkdir()
    (source / "figures" / "a.png").write_bytes(b"a")
    (source / "figures" / "again").symlink_to(source)
    (source / "lost.md").symlink_to("nowhere")
    for path in source.rglob("*"):
        path.chmod(path.stat().st_mode & ~0o222) if path.exists() else None
    changes = {"checkpoint.last_save_in_hf": True, "job.dump_folder": str(source / "runs" / "1")}
    changes |= {"checkpoint.exclude_from_loading": ["ids", "mask"]}
    train(config_of(tmp_path, frozen(source, **changes)))
    out = source / "runs" / "1" / "checkpoint" / "step-2.hf"
    left = {"runs", "lost.md", "again"}
    copied = {p.name for p in source.rglob("*") if "runs" not in p.parts} - left
    assert {p.name for p in out.rglob("*")} == copied
    assert all(p.stat().st_mode & 0o200 for p in (out, *out.rglob("*")) if p.suffix != WEIGHTS)
    assert torch.equal(load_file(out / NATIVE)["ids"], held["ids"])
    assert torch.equal(load_file(out / NATIVE)["mask"], held["mask"])


def test_a_run_that_no_folder_can_hold_does_not_begin(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", "llama")
    keys = frozen(tmp_path / "model", **{"checkpoint.last_save_in_hf": True})
    with pytest.raises(UserError, match="no engine knows modules beside LlamaForCausalLM"):
        Trainer(config_of(tmp_path, keys))
    write_native(tmp_path / "pickled", "glm4_moe")
    torch.save(tensors_of(tmp_path / "pickled"), tmp_path / "pickled" / "pytorch_model.bin")
    for file in (tmp_path / "pickled").glob("model*"):
        file.unlink()
    with pytest.raises(UserError, match="pickled has no safetensors files; save it as such first"):
        Trainer(config_of(tmp_path, keys | {"model.hf_assets_path": str(tmp_path / "pickled")}))


def test_another_model_is_not_written_into_the_folder(tmp_path: Path, capsys: Any) -> None:
    write_native(tmp_path / "model", "glm4_moe")
    train(config_of(tmp_path, frozen(tmp_path / "model")))
    told = json.loads((tmp_path / "model" / "config.json").read_text())
    command = [str(tmp_path / "run"), str(tmp_path / "out"), "--format", "same"]
    for value, error in (
        ("much", "no config.json that transformers can read"),
        (2.5, "trained with 1.0; name its folder"),
    ):
        changed = json.dumps(told | {"routed_scaling_factor": value})
        (tmp_path / "model" / "config.json").write_text(changed)
        assert export_command(command) == 1
        message = capsys.readouterr().err.splitlines()[-1]
        assert error in message and "routed_scaling_factor" in message
        assert not (tmp_path / "out").exists()
