"""Folders that are moved: what commands leave for later names nothing by where it was written."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from formats_run import SEQUENTIAL, SMALL, write_run
from runs import config_of, same, train, write_corpus
from small_tokenizers import byte_level
from torchtitan_mtp.checkpoint.manifest import read_manifest, write_manifest
from torchtitan_mtp.config import load_toml, parse_args
from torchtitan_mtp.data.tokenizer import build_tokenizer
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats import export_checkpoint, import_checkpoint
from torchtitan_mtp.inference import load_for_inference

HERE_KEYS = {"checkpoint.enable": True, "checkpoint.interval": 2, "mtp.heads": "sequential"}
ONE_LAYER = {"model.args.n_layers": 1}
SMALLEST = SMALL | ONE_LAYER


def test_a_moved_run_goes_on_and_leaves_in_other_formats(tmp_path: Path, monkeypatch) -> None:
    data = write_corpus(tmp_path, "jsonl")
    keys = data | ONE_LAYER | HERE_KEYS | {"training.steps": 4}
    # The tokenizer in the run's own folder, named as a user may: from the current folder.
    place = tmp_path / "made_here"
    (place / "run" / "words").mkdir(parents=True)
    write_run(tmp_path / "bytes", **SMALLEST)
    export_checkpoint(tmp_path / "bytes", tmp_path / "hf", "llama_hf")
    shutil.copy(tmp_path / "hf" / "tokenizer.json", place / "run" / "words")
    shutil.copy(tmp_path / "hf" / "tokenizer_config.json", place / "run" / "words")
    monkeypatch.chdir(tmp_path)
    keys |= {"model.hf_assets_path": "made_here/run/words"}
    more = {"training.steps": 6, "job.dump_folder": str(place / "whole")}
    whole = train(config_of(place, keys, more, {"checkpoint.enable": False}))
    more = {"job.dump_folder": "made_here/run", "checkpoint.last_save_in_hf": True}
    first = train(config_of(place, keys, more))
    export_checkpoint(place / "run", place / "dcp", "torchtitan", drop_heads=True)
    import_checkpoint(place / "run/checkpoint/step-4.hf", place / "back", "glm4_moe_hf")
    for folder in ("run", "dcp", "back"):
        for file in (place / folder).rglob("*"):
            assert file.is_dir() or b"made_here" not in file.read_bytes(), file

    (tmp_path / "elsewhere").mkdir()
    place.rename(tmp_path / "moved")
    moved = tmp_path / "moved" / "run"
    monkeypatch.chdir(tmp_path / "elsewhere")
    model, tokenizer, config = load_for_inference(moved)
    assert config.job.dump_folder == str(moved)
    assert config.model.hf_assets_path == str(moved / "words")
    assert tokenizer.fingerprint.startswith("hf:")
    # Where the files beside it say something else by now, texts have around them what they had.
    checkpoint, manifest = moved / "checkpoint/step-4", read_manifest(moved / "checkpoint/step-4")
    ids = manifest.tokenizer.removesuffix(":256:257")
    write_manifest(checkpoint, replace(manifest, tokenizer=f"{ids}:3,4:5"))
    framed = load_for_inference(moved)[1]
    assert (framed.prefix, framed.eos_id) == ((3, 4), 5)
    write_manifest(checkpoint, manifest)
    assert torch.equal(model.norm.weight, first.weights["norm.weight"])
    export_checkpoint(moved, tmp_path / "again", "glm4_moe_hf")
    before = (moved / "checkpoint/step-4.hf/model.safetensors").read_bytes()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == before
    resumed = train(
        parse_args(["--job.config_file", f"{moved}/config.toml", "--training.steps", "6"])
    )
    assert resumed.start == 2 and same(resumed.weights, whole.weights)
    assert (moved / "checkpoint" / "step-6").is_dir() and not (tmp_path / "made_here").exists()


def test_a_moved_import_keeps_its_tokenizer(tmp_path: Path, monkeypatch) -> None:
    """And does not take that of the model which was imported into its place since."""
    write_run(tmp_path / "run", **SMALLEST, **SEQUENTIAL)
    export_checkpoint(tmp_path / "run", tmp_path / "a", "glm4_moe_hf")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    tokenizer = Tokenizer.from_file(str(tmp_path / "b" / "tokenizer.json"))
    tokenizer.add_tokens(["another"])
    tokenizer.save(str(tmp_path / "b" / "tokenizer.json"))
    import_checkpoint(tmp_path / "a", tmp_path / "out", "glm4_moe_hf")
    (tmp_path / "out").rename(tmp_path / "kept")
    import_checkpoint(tmp_path / "b", tmp_path / "out", "glm4_moe_hf")
    monkeypatch.chdir(tmp_path / "out")  # a folder with a tokenizer/ of its own
    for place, given in (("kept", "a"), ("out", "b")):
        _, found, config = load_for_inference(tmp_path / place)
        assert found.fingerprint == build_tokenizer(str(tmp_path / given)).fingerprint
        assert config.job.dump_folder == str(tmp_path / place)
        assert str(tmp_path) not in (tmp_path / place / "config.toml").read_text()
    export_checkpoint(tmp_path / "kept", tmp_path / "c", "glm4_moe_hf")
    vocabulary = json.loads((tmp_path / "c" / "tokenizer.json").read_text())["added_tokens"]
    assert "another" not in [token["content"] for token in vocabulary]
    # Without it, nothing else is taken for it.
    shutil.rmtree(tmp_path / "kept" / "tokenizer")
    with pytest.raises(UserError, match="kept/tokenizer: no such file or folder"):
        load_for_inference(tmp_path / "kept")


def test_a_path_that_means_another_tokenizer_by_now_is_refused(tmp_path: Path, monkeypatch) -> None:
    """Another current folder with a tokenizer of that name; another import where one was."""
    for place, letters in (("a", ""), ("b", "swapped")):
        (tmp_path / place / "tok").mkdir(parents=True)
        made = json.loads(byte_level("<|endoftext|>").to_str())
        if letters:  # other ids for the same text, as many of them
            ids = made["model"]["vocab"]
            ids["A"], ids["B"] = ids["B"], ids["A"]
        (tmp_path / place / "tok" / "tokenizer.json").write_text(json.dumps(made))
        write_run(tmp_path / place / "run", **SMALLEST, **{"model.hf_assets_path": f"{place}/tok"})
        monkeypatch.chdir(tmp_path)
        export_checkpoint(f"{place}/run", tmp_path / place / "hf", "llama_hf")
        import_checkpoint(tmp_path / place / "hf", tmp_path / place / "imported")
    data = write_corpus(tmp_path, "jsonl")
    keys = data | ONE_LAYER | HERE_KEYS | {"training.steps": 2, "checkpoint.interval": 1}
    for path in ("tok", "imported/tokenizer"):
        monkeypatch.chdir(tmp_path / "a")
        named = str(tmp_path / "a" / path) if "/" in path else path
        train(config_of(tmp_path, keys | {"model.hf_assets_path": named, "job.dump_folder": "r"}))
        export_checkpoint("r", tmp_path / "own", "glm4_moe_hf")
        if "/" in path:
            Path("imported").rename("kept")
            shutil.copytree(tmp_path / "b" / "imported", "imported")
        else:
            monkeypatch.chdir(tmp_path / "b")
        wrong = re.escape(f"; {os.path.abspath(path)} is another, hf:")
        for step in ("step-1", "step-2"):  # full, model only
            checkpoint = tmp_path / "a" / "r" / "checkpoint" / step
            with pytest.raises(UserError, match=f"{checkpoint}: goes with .*{wrong}") as refused:
                load_for_inference(checkpoint)
            assert "\n" not in str(refused.value)
            assert "model.hf_assets_path in the run's config.toml" in str(refused.value)
            for form in ("glm4_moe_hf", "meta"):
                with pytest.raises(UserError, match=wrong):
                    export_checkpoint(checkpoint, tmp_path / "no", form, drop_heads=True)
            assert not (tmp_path / "no").exists()
            # Of before there was a fingerprint.
            manifest = read_manifest(checkpoint)
            write_manifest(checkpoint, replace(manifest, tokenizer=None))
            load_for_inference(checkpoint)
        shutil.rmtree(tmp_path / "a" / "r")
        shutil.rmtree(tmp_path / "own")
    shutil.copytree(tmp_path / "b/tok", tmp_path / "a/kept/tokenizer", dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"kept/tokenizer is another, hf:"):
        load_for_inference(tmp_path / "a" / "kept")


def test_paths_that_a_user_gives_stay(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    named = parse_args(["--job.config_file", "debug_parallel.toml"])  # a recipe, by its name
    assert named.job.config_file == "debug_parallel.toml" and named.mtp.num_future_tokens > 1
    data = write_corpus(tmp_path, "jsonl")
    keys = data | {"job.dump_folder": ".", "training.steps": 1, "checkpoint.folder": "ckpt"}
    train(config_of(tmp_path, keys, {"training.dataset_path": "corpus.jsonl"}))
    text = (tmp_path / "config.toml").read_text()
    assert 'dump_folder = "{here}"\n' in text and 'dataset_path = "{here}/corpus.jsonl"\n' in text
    assert 'hf_assets_path = "byte"\n' in text and '\nfolder = "ckpt"\n' in text
    train(config_of(tmp_path, keys | {"job.dump_folder": "run"}))
    text = (tmp_path / "run" / "config.toml").read_text()
    assert f'dataset_path = "{tmp_path}/corpus.jsonl"\n' in text
    assert load_toml(tmp_path / "run" / "config.toml").job.dump_folder == str(tmp_path / "run")
