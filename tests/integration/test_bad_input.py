"""What a user can get wrong ends in one line that says what to do, through the real entry point."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from runs import config_of, documents
from torchtitan_mtp.config import to_toml
from torchtitan_mtp.train import main
from torchtitan_mtp.trainer import Trainer


@pytest.fixture
def recipe(tmp_path) -> Path:
    """A TOML that trains two steps."""
    path = tmp_path / "run.toml"
    keys = {"training.steps": 2, "checkpoint.enable": True, "checkpoint.interval": 1}
    path.write_text(to_toml(config_of(tmp_path, keys)))
    return path


@pytest.fixture
def fails(recipe, capsys):
    """Run with more arguments; the one line that it fails with."""

    def run(*arguments: str, config_file: Path = recipe) -> str:
        capsys.readouterr()
        assert main(["--job.config_file", str(config_file), *arguments]) == 1
        output = capsys.readouterr()
        errors = [line for line in output.err.splitlines() if "error: " in line]
        assert len(errors) == 1 and errors[0].startswith("error: "), output.err
        assert "Traceback" not in output.err + output.out
        assert output.err.endswith(errors[0] + "\n")
        return errors[0]

    return run


def test_the_recipe_itself_trains(recipe, tmp_path):
    assert main(["--job.config_file", str(recipe)]) == 0
    assert (tmp_path / "run" / "checkpoint" / "step-2").is_dir()
    assert (tmp_path / "run" / "config.toml").is_file()


def test_missing_config_file(fails, tmp_path):
    line = fails(config_file=tmp_path / "no.toml")
    assert "no.toml" in line


WRONG = {
    # arguments -> what the line must say: the key, what was found, and a way out
    "--training.dataset_path /no/such/place": ["training.dataset_path", "/no/such/place"],
    "--training.dataset_path=  --training.dataset nothing": ["'nothing'", "python_stdlib"],
    "--model.flavor 9B": ["model.flavor", "9B", "8B"],
    "--model.name gpt": ["model.name", "gpt", "llama3"],
    "--model.vocab_size 100": ["100", "model.vocab_size", "at least 259"],
    "--mtp.num_future_tokens 33": ["mtp.num_future_tokens", "33", "training.seq_len"],
    "--mtp.loss_weights 1,2,3": ["mtp.loss_weights", "3 entries", "2"],
    "--mtp.num_future_tokens 4 --mtp.match_parameters": ["mtp.match_parameters", "lower"],
    "--parallelism.data_parallel_shard_degree 2": ["data_parallel_shard_degree", "2", "-1"],
    "--parallelism.data_parallel_replicate_degree 3": ["replicate_degree = 3", "1"],
    "--parallelism.pipeline_parallel_degree 2": ["degree = 2", "pipeline degree to 1"],
    "--training.global_batch_size 3": ["global_batch_size", "3", "local_batch_size"],
    "--checkpoint.initial_load_path /no/checkpoint": ["/no/checkpoint"],
    "--checkpoint.load_step 7": ["load_step", "step-7"],
    "--checkpoint.keep_latest_k 1": ["keep_latest_k", "0 or >= 2"],
    "--model.converters mtp,quantize.linear.mx": ["quantize.linear.mx", "quantize.linear.float8"],
    "--model.hf_assets_path /no/tokenizer": ["/no/tokenizer"],
    "--training.step 5": ["training.step", "training.steps"],
    "--training.steps five": ["training.steps", "five"],
    "--validation.enable --validation.dataset c5": ["c5"],
    "--loss.backend naive": ["loss.backend"],
    "--mtp.heads sequential --mtp.engine joint": ["mtp.engine", "one way", "head_by_head"],
    "--compile.enable --compile.backend inductr": ["compile.backend", '"inductr"', "mean inductor"],
    "--checkpoint.last_save_in_hf --loss.softcap 30": ["last_save_in_hf", "loss.softcap = 30.0"],
    "--mtp.loss_scale_final 0.5": ["mtp.loss_scale_final = 0.5", "mtp.loss_scale_schedule"],
}


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_settings(arguments, fails):
    line = fails(*arguments.split())
    for part in WRONG[arguments]:
        assert part in line, line


def test_empty_corpus(fails, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    line = fails("--training.dataset_path", str(tmp_path / "empty.jsonl"))
    assert "empty.jsonl" in line and "no document" in line
    (tmp_path / "folder").mkdir()
    assert "folder" in fails("--training.dataset_path", str(tmp_path / "folder"))


def test_damaged_corpus(fails, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n{"text": broken}\n')
    line = fails("--training.dataset_path", str(path))
    assert re.search(r"bad\.jsonl.*2", line)


def test_nothing_to_hold_out(fails, tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"text": "one document only " * 9}) + "\n")
    line = fails("--training.dataset_path", str(path), "--validation.enable")
    assert "1 document" in line and "validation.enable" in line


def test_documents_shorter_than_a_head_looks_train(recipe, tmp_path):
    """No target for heads 2 and 3 anywhere: their losses are 0, head 1 trains."""
    path = tmp_path / "short.jsonl"
    path.write_text("".join('{"text": ""}\n' for _ in range(9)))
    assert main(["--job.config_file", str(recipe), "--training.dataset_path", str(path)]) == 0
    path.write_text("".join(json.dumps({"text": t[:2]}) + "\n" for t in documents()))
    for heads in ("parallel", "sequential"):
        arguments = ["--training.dataset_path", str(path), "--mtp.num_future_tokens", "7"]
        folder = ["--job.dump_folder", str(tmp_path / heads), "--mtp.heads", heads]
        assert main(["--job.config_file", str(recipe), *arguments, *folder]) == 0


def test_a_folder_that_cannot_be_written(fails, tmp_path):
    (tmp_path / "file").write_text("in the way")
    line = fails("--job.dump_folder", str(tmp_path / "file"))
    assert str(tmp_path / "file") in line


def test_resume_with_other_data_or_other_heads(recipe, fails, tmp_path):
    saves = ("--checkpoint.no_last_save_model_only",)
    assert main(["--job.config_file", str(recipe), *saves]) == 0
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": t}) + "\n" for t in documents(seed=3)))
    line = fails("--training.dataset_path", str(other), "--training.steps", "3")
    assert "training.dataset" in line and "exclude_from_loading" in line
    line = fails("--mtp.num_future_tokens", "2", "--training.steps", "3")
    assert "step-2" in line and "mtp.num_future_tokens = 3, this run has 2" in line
    line = fails("--training.seed", "5", "--training.steps", "3")
    assert "training.seed" in line


@pytest.mark.parametrize("when", ["logged", "unlogged"])
def test_a_loss_that_is_not_finite_stops_the_run_unsaved(when, fails, tmp_path, monkeypatch):
    """Also where no log line falls on the step: nothing poisoned is ever saved."""
    step, count = Trainer.train_step, 0

    def poisoned(self: Trainer) -> None:
        nonlocal count
        count += 1
        if count == 3:
            with torch.no_grad():
                self.model.norm.weight.fill_(torch.nan)
        step(self)

    monkeypatch.setattr(Trainer, "train_step", poisoned)
    frequency = "1" if when == "logged" else "100"
    line = fails("--training.steps", "8", "--metrics.log_freq", frequency)
    assert "step 3" in line and "nan" in line and "optimizer.lr" in line
    saved = sorted(p.name for p in (tmp_path / "run" / "checkpoint").glob("step-*"))
    assert saved == ["step-1", "step-2"]


def test_debug_shows_the_traceback(recipe):
    from torchtitan_mtp.errors import UserError

    with pytest.raises(UserError, match="9B"):
        main(["--job.config_file", str(recipe), "--model.flavor", "9B", "--job.debug"])
