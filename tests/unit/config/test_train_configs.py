"""The recipes in train_configs/, and TorchTitan's own."""

import re
from pathlib import Path

import pytest

from torchtitan_mtp.config import load_toml, parse_args, to_toml
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.flavors import model_args

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
        "mtp_8b_64gpu",
        "mtp_8b_128k_context",
        "mtp_byte_7b",
        "finetune_add_heads",
        "finetune_native_mtp",
        "fastmtp",
        "sft_keep_heads",
        "add_heads_hf",
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


# TOML files of TorchTitan v0.2.2: name, flavor, and what is refused (docs/torchtitan.md).
FT = "job.custom_config_module=torchtitan.components.ft.config"
TORCHTITAN = {
    "llama3/debug_model": ("llama3", "debugmodel", None),
    "llama3/llama3_8b": ("llama3", "8B", None),
    "llama3/llama3_70b": ("llama3", "70B", None),
    "llama3/llama3_405b": ("llama3", "405B", "parallelism.enable_async_tensor_parallel=true"),
    "llama3_ft/debug_model": ("llama3", "debugmodel", FT),
    "qwen3/qwen3_0.6b": ("qwen3", "0.6B", None),
    "qwen3/qwen3_1.7b": ("qwen3", "1.7B", None),
    "qwen3/qwen3_32b": ("qwen3", "32B", None),
    "qwen3/qwen3_moe_debug": ("qwen3", "debugmodel_moe", "model.flavor=debugmodel_moe"),
    "deepseek_v3/debug_model": ("deepseek_v3", "debugmodel", None),
    "deepseek_v3/deepseek_v3_16b": ("deepseek_v3", "16B", None),
    "deepseek_v3/deepseek_v3_671b": ("deepseek_v3", "671B", None),
    "llama4/debug_model": ("llama4", "debugmodel", "model.name=llama4"),
    "llama4/llama4_17bx16e": ("llama4", "17bx16e", "model.name=llama4"),
    "llama4/llama4_17bx128e": ("llama4", "17bx128e", "model.name=llama4"),
    "gpt_oss/debug_model": ("gpt_oss", "debugmodel", "model.name=gpt_oss"),
}


@pytest.mark.parametrize("recipe", TORCHTITAN)
def test_which_of_torchtitans_recipes_run(recipe):
    name, flavor, refused = TORCHTITAN[recipe]
    key, _, value = (refused or "").partition("=")
    argv = [f"--model.name={name}", f"--model.flavor={flavor}"]
    argv += [] if not key or key.startswith("model.") else [f"--{refused}"]

    def read() -> None:
        config = parse_args(argv)
        model_args(config.model.name, config.model.flavor, tokenizer_vocab=256)

    if refused is None:
        read()
    else:
        with pytest.raises(UserError, match=rf'^{re.escape(key)} = "?{re.escape(value)}'):
            read()
    page = (ROOT / "docs" / "torchtitan.md").read_text()
    (row,) = (line for line in page.splitlines() if line.startswith(f"| `{recipe}.toml` |"))
    assert (" runs " in row) == (refused is None) and key in row


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_found_by_its_name_from_any_folder(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse_args(["--job.config_file", recipe.name])
    assert config.job.config_file == recipe.name  # as given: config.toml holds no other path
    config.job.config_file = None
    assert config == load_toml(recipe)


def test_a_file_of_the_name_comes_before_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mtp_8b.toml").write_text("[training]\nsteps = 7\n")
    config = parse_args(["--job.config_file", "mtp_8b.toml"])
    assert (config.job.config_file, config.training.steps) == ("mtp_8b.toml", 7)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("mtp_9b.toml", "mtp_8b.toml"),
        ("train_configs/mtp_8b.toml", "mtp_8b.toml"),
        ("mtp_8b", "mtp_8b.toml"),
        ("debug_paralel.toml", "debug_parallel.toml"),
        ("debug_parallel", "debug_parallel.toml"),
        ("./DEBUG_PARALLEL.toml", "debug_parallel.toml"),
        ("x", ""),
    ],
)
def test_a_config_file_that_is_not_there_is_told_with_those_that_are(
    name, nearest, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    recipes = ", ".join(path.name for path in RECIPES)
    hint = f"; did you mean {nearest}?" if nearest else ""
    for read in (lambda: parse_args(["--job.config_file", name]), lambda: load_toml(name)):
        with pytest.raises(UserError) as raised:
            read()
        assert str(raised.value) == f"{name}: no such file; found by name: {recipes}{hint}"


def test_a_recipe_is_read_by_its_name_wherever_a_file_is(tmp_path, monkeypatch):
    """As `torchtitan-mtp-import --config` does."""
    monkeypatch.chdir(tmp_path)
    recipe = next(path for path in RECIPES if path.name == "debug_parallel.toml")
    assert load_toml("debug_parallel.toml") == load_toml(recipe)
