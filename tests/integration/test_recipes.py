"""The recipes in train_configs, and the launcher, for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from math import inf
from pathlib import Path

import pytest
import torch

from native_folders import write_native
from runs import same, train
from torchtitan_mtp.build import model_args_from_config
from torchtitan_mtp.cli.generate import main as generate
from torchtitan_mtp.config import MTP, JobConfig, load_toml
from torchtitan_mtp.data.tokenizer import build_tokenizer
from torchtitan_mtp.distributed.activation_checkpoint import apply_activation_checkpointing
from torchtitan_mtp.models.flavors import flavors
from torchtitan_mtp.models.transformer import build_model
from torchtitan_mtp.monitoring.flops import forward_backward_flops_per_token
from torchtitan_mtp.mtp import add_heads

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "train_configs").glob("*.toml"))
NATIVE = "finetune_native_mtp"
FASTMTP, SFT = "fastmtp", "sft_keep_heads"
# Their models; docs/your_model.md trains the first.
IN_A_FOLDER = {"add_heads_hf", NATIVE, FASTMTP, SFT}


@pytest.mark.parametrize(
    "recipe", [r for r in RECIPES if r.stem not in IN_A_FOLDER], ids=lambda recipe: recipe.stem
)
def test_a_recipes_model_builds(recipe):
    """On the meta device: every shape fits, and the heads are there."""
    config = load_toml(recipe)
    open_vocabulary = flavors[config.model.name][config.model.flavor].vocab_size is None
    vocab = build_tokenizer(config.model.hf_assets_path).vocab_size if open_vocabulary else 1
    args = model_args_from_config(config, vocab)
    model = build_model(args, getattr(torch, config.training.dtype))
    trunk = sum(p.numel() for p in model.parameters())
    if "mtp" in config.model.converters:
        add_heads(model, config.mtp)
        n = config.mtp.num_future_tokens
        assert n > 1 and model.mtp.num_future_tokens == n
        assert len(model.mtp.heads) == (1 if config.mtp.share_weights else n - 1)
        total = sum(p.numel() for p in model.parameters())
        assert (total == trunk) == config.mtp.match_parameters
    else:
        assert model.mtp is None
    apply_activation_checkpointing(model, config.activation_checkpoint)
    assert forward_backward_flops_per_token(model, config.training.seq_len) > 0


def of_folder(recipe: str, layout: str, folder: Path) -> JobConfig:
    """A recipe for two steps on a small folder in a released model's layout, which it writes."""
    config, source = load_toml(ROOT / "train_configs" / f"{recipe}.toml"), folder / "model"
    write_native(source, layout)
    config.model.hf_assets_path, config.job.dump_folder = str(source), str(folder / "run")
    config.training.steps, config.training.seq_len, config.lr_scheduler.warmup_steps = 2, 32, 0
    config.training.global_batch_size = -1
    config.metrics.enable_tensorboard = False
    return config


def files_that_differ(folder: Path) -> list[str]:
    """Of the folder that a run left beside the one that it began from, which has the same files."""
    source, out = folder / "model", folder / "run" / "checkpoint" / "step-2.hf"
    files = {file.name for file in source.iterdir()}
    assert files == {file.name for file in out.iterdir()}
    return sorted(name for name in files if not same_file(source / name, out / name))


MODULES = "model-00003-of-00003.safetensors"
TEMPLATE = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"


def test_the_recipe_of_a_released_models_module_trains(tmp_path):
    """On a small folder in Qwen3-Next's layout; out comes that folder with another module."""
    config = of_folder(NATIVE, "qwen3_next", tmp_path)
    (tmp_path / "text.txt").write_text("the cat and the dog " * 200)
    config.training.dataset_path = str(tmp_path / "text.txt")
    train(config)
    assert files_that_differ(tmp_path) == [MODULES]


def test_the_recipe_of_fastmtp_trains_on_the_models_own_answers(tmp_path, capsys):
    """On a small folder in MiMo's layout, whose one module makes all drafts in the end."""
    config = of_folder(FASTMTP, "mimo", tmp_path)
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    asked = [[{"role": "user", "content": f"the {'cat ' * i}?"}] for i in range(6)]
    prompts.write_text("".join(json.dumps({"messages": m}) + "\n" for m in asked))
    command = ["--prompt_file", str(prompts), "--output", str(answers), "--max_new_tokens", "24"]
    command += ["--chat", "--temperature", "1"]
    assert generate([str(tmp_path / "model"), *command]) == 0
    config.training.dataset_path = str(answers)
    run = train(config)
    assert torch.tensor(run.losses).isfinite().all() and len(run.losses[0]) == 4
    assert files_that_differ(tmp_path) == [MODULES]
    for folder in ("run", "run/checkpoint/step-2.hf"):
        decode = ["--prompt", "the cat", "--max_new_tokens", "12", "--compare"]
        capsys.readouterr()
        assert generate([str(tmp_path / folder), *decode]) == 0
        assert "identical" in capsys.readouterr().out


def test_the_recipe_that_tunes_a_model_and_its_modules_trains(tmp_path):
    """The model learns as without modules; but for the norm that is clipped, which they are in."""
    config = of_folder(SFT, "mimo", tmp_path)
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    talk = [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "the dog"}]
    file = tmp_path / "conversations.jsonl"
    file.write_text((json.dumps({"messages": talk}) + "\n") * 9)
    config.training.dataset_path, config.training.max_norm = str(file), inf
    with_modules = train(config)
    weights = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert files_that_differ(tmp_path) == weights
    config.job.dump_folder, config.model.converters = str(tmp_path / "plain"), []
    config.mtp, config.checkpoint.last_save_in_hf = MTP(), False
    plain = train(config)
    assert [losses[:1] for losses in with_modules.losses] == plain.losses
    assert same(with_modules.trunk, plain.weights)


def same_file(a: Path, b: Path) -> bool:
    return a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("name", ["debug_parallel", "debug_sequential"])
def test_a_debug_recipe_trains(name, tmp_path):
    """As it stands, but shorter; twice, to the same numbers: it promises to be deterministic."""
    runs = []
    for i in range(2):
        config = load_toml(ROOT / "train_configs" / f"{name}.toml")
        config.job.dump_folder = str(tmp_path / str(i))
        config.training.steps = 2
        runs.append(train(config))
    first, second = runs
    assert len(first.losses) == 2 and len(first.losses[0]) == 4
    assert first.losses == second.losses
    assert all(torch.equal(w, second.weights[name]) for name, w in first.weights.items())
    for before, after in zip(first.losses[0], first.losses[-1], strict=True):
        assert after < before


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) of the one TensorBoard file below `folder`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (path,) = folder.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(path))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


@pytest.mark.slow
@pytest.mark.distributed
def test_the_launcher_trains_on_two_ranks(tmp_path):
    """run_train.sh and torchrun as users call them; one process gives the same losses."""
    kept = {k: v for k, v in os.environ.items() if k not in ("CONFIG_FILE", "LOG_RANK")}
    # The recipe by its bare name, from a folder that has no such file.
    environment = {**kept, "NGPU": "2", "OMP_NUM_THREADS": "1"}
    environment["CONFIG_FILE"] = "debug_sequential.toml"
    if not (ROOT / ".venv").exists():  # set-up would make one: use the Python that runs this
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    recipe = ROOT / "train_configs" / "debug_sequential.toml"
    arguments = ["--job.dump_folder", str(tmp_path / "run")]
    arguments += ["--training.steps", "2", "--training.seq_len", "32", "--model.args.n_layers", "2"]
    arguments += ["--metrics.enable_tensorboard", "--checkpoint.enable"]
    arguments += ["--training.mixed_precision_param", "float32"]  # "auto" takes what is faster then
    result = subprocess.run(
        ["bash", str(ROOT / "run_train.sh"), *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "step:  2" in result.stdout + result.stderr
    assert (tmp_path / "run" / "checkpoint" / "step-2" / ".metadata").is_file()
    logged = scalars(tmp_path / "run")
    losses = logged["loss_metrics/global_avg_loss"]
    assert [step for step, _ in losses] == [1, 2]
    assert logged["n_tokens_seen"][-1][1] == 2 * 2 * 2 * 32  # steps, ranks, rows, tokens

    config = load_toml(recipe)
    config.job.dump_folder = str(tmp_path / "alone")
    config.training.steps, config.training.seq_len, config.training.local_batch_size = 2, 32, 4
    config.model.args.n_layers, config.training.mixed_precision_param = 2, "float32"
    alone = train(config)
    for k in range(1, 5):
        found = [value for _, value in logged[f"loss_metrics/mtp_head_{k}_loss"]]
        assert found == pytest.approx([heads[k - 1] for heads in alone.losses], rel=1e-4)
