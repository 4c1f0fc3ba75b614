"""The recipes in train_configs/, and TorchTitan's own."""

import re
from pathlib import Path

import pytest

from torchtitan_mtp.config import load_toml, parse_args, to_toml

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted((ROOT / "train_configs").glob("*.toml"))

# Key by key what TorchTitan v0.2's llama3_8b.toml sets.
TORCHTITAN_LLAMA3_8B = """
[job]
dump_folder = "./outputs"
description = "Llama 3 8B training"

[profiling]
enable_profiling = true
save_traces_folder = "profile_trace"
profile_freq = 100

[metrics]
log_freq = 10
enable_tensorboard = true
save_tb_folder = "tb"

[model]
name = "llama3"
flavor = "8B"
hf_assets_path = "./assets/hf/Llama-3.1-8B"
# converters = ["float8"]

[optimizer]
name = "AdamW"
lr = 3e-4
eps = 1e-8

[lr_scheduler]
warmup_steps = 200  # lr scheduler warm up

[training]
local_batch_size = 1
seq_len = 8192
max_norm = 1.0  # grad norm clipping
steps = 1000
dataset = "c4"

[parallelism]
data_parallel_replicate_degree = 1
data_parallel_shard_degree = -1
tensor_parallel_degree = 1
pipeline_parallel_degree = 1
context_parallel_degree = 1

[checkpoint]
enable = false
folder = "checkpoint"
interval = 500
last_save_model_only = true
export_dtype = "float32"
async_mode = "disabled" # ["disabled", "async", "async_with_pinned_mem"]

[compile]
enable=false
components = ["model", "loss"]

[activation_checkpoint]
mode = "selective"  # ["none", "selective", "full"]
selective_ac_option = "op"

[quantize.linear.float8]
enable_fsdp_float8_all_gather = false
precompute_float8_dynamic_scale_for_fsdp = false
filter_fqns = ["output"]

[validation]
enable = false
dataset = "c4_validation"
freq = 500
steps = 1200
"""


def test_torchtitans_llama3_8b_runs_unchanged(tmp_path):
    path = tmp_path / "llama3_8b.toml"
    path.write_text(TORCHTITAN_LLAMA3_8B)
    config = load_toml(path)
    assert config.training.seq_len == 8192
    assert config.optimizer.lr == 3e-4
    assert config.quantize.linear.float8.filter_fqns == ["output"]
    assert config.validation.steps == 1200
    assert config.model.converters == []
    assert config == load_toml(ROOT / "train_configs" / "llama3_8b.toml")


def test_the_recipes_are_there():
    assert {recipe.stem for recipe in RECIPES} >= {
        "quickstart",
        "debug_parallel",
        "debug_sequential",
        "llama3_8b",
        "mtp_8b",
        "mtp_8b_sequential",
        "mtp_byte_7b",
        "finetune_add_heads",
        "debug_deepseek_v3",
        "deepseek_v3_16b_mtp",
        "deepseek_v3_671b_mtp",
    }


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_parses_and_round_trips(recipe, tmp_path):
    config = load_toml(recipe)
    assert ("mtp" in config.model.converters) == (recipe.stem != "llama3_8b")
    copy = tmp_path / "copy.toml"
    copy.write_text(to_toml(config), encoding="utf-8")
    assert load_toml(copy) == config
    assert parse_args(["--job.config_file", str(recipe)]).training == config.training


def test_the_commented_float8_lines_of_mtp_8b_work(tmp_path):
    text = (ROOT / "train_configs" / "mtp_8b.toml").read_text()
    text = text.replace('converters = ["mtp"]\n', "", 1)
    text = re.sub(r"^# (?=converters = |\[quantize|\w+ = )", "", text, flags=re.MULTILINE)
    path = tmp_path / "run.toml"
    path.write_text(text)
    config = load_toml(path)
    assert config.model.converters == ["mtp", "quantize.linear.float8"]
    assert config.quantize.linear.float8.enable_fsdp_float8_all_gather


def test_debug_recipes_are_small():
    for name in ("debug_parallel", "debug_sequential"):
        training = load_toml(ROOT / "train_configs" / f"{name}.toml").training
        assert (training.steps, training.seq_len, training.local_batch_size) == (10, 128, 2)
