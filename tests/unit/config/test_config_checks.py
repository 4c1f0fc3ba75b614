"""Configurations that can't be, each refused in one line that says why."""

import json
import re

import pytest

from torchtitan_mtp.config import JobConfig, check, load_toml, parse_args
from torchtitan_mtp.config.checks import check_new_run
from torchtitan_mtp.config.setting import options
from torchtitan_mtp.config.torchtitan import known_options
from torchtitan_mtp.errors import UserError

MTP = ["--model.converters", "mtp"]
TAUGHT = ["--mtp.target", "trunk"]


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_args(list(argv))
    message = str(caught.value)
    assert "\n" not in message
    return message


UNSUPPORTED = [
    "parallelism.context_parallel_rotate_method=alltoall",
    "parallelism.context_parallel_load_balancer=ptrr",
    "parallelism.pipeline_parallel_schedule_csv=x",
    "parallelism.expert_parallel_comm_backend=deepep",
    "parallelism.expert_tensor_parallel_degree=2",
    "parallelism.enable_async_tensor_parallel=true",
    "parallelism.disable_loss_parallel=true",
    "parallelism.enable_compiled_autograd=true",
    "optimizer.early_step_in_backward=true",
    "fault_tolerance.enable=true",
    "memory_estimation.enable=true",
    "job.custom_config_module=x",
    "experimental.custom_import=x",
    "training.dataloader.num_workers=2",
    "training.mixed_precision_reduce=bfloat16",
    "comm.mode=local_tensor",
]


def test_transformers_own_attention_is_its_own():
    message = refusal("--model.name", "hf", "--model.attn_type", "varlen")
    assert message.startswith('model.attn_type = "varlen": model.name = "hf" attends as')


@pytest.mark.parametrize("setting", UNSUPPORTED)
def test_an_unsupported_key_fails_by_name(setting):
    name = setting.partition("=")[0]
    message = refusal(f"--{setting}")
    assert message.startswith(f"{name} = ")
    assert "not supported here yet" in message


@pytest.mark.parametrize("setting", UNSUPPORTED)
def test_an_unsupported_key_may_state_its_default(setting, tmp_path):
    option = known_options()[setting.partition("=")[0]]
    value = json.dumps(option.default)
    path = tmp_path / "run.toml"
    path.write_text(f"[{'.'.join(option.path[:-1])}]\n{option.path[-1]} = {value}\n")
    assert load_toml(path) == JobConfig()


def test_a_key_without_effect_may_have_any_value(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        "[parallelism]\npipeline_parallel_expert_parallel_overlap = true\n"
        "[quantize.linear.mx]\nfilter_fqns = []\n[activation_checkpoint]\nmemory_budget = 0.3\n"
    )
    flags = ["--quantize.grouped_mm.mx.recipe_name", "x", "--fault_tolerance.replica_id", "3"]
    config = parse_args(["--job.config_file", str(path), *flags])
    config.job.config_file = None
    assert config == JobConfig()


def test_modules_of_pipeline_stages_are_refused(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[parallelism]\nmodule_fqns_per_model_part = [["tok_embeddings"], ["norm"]]\n')
    with pytest.raises(UserError, match=r"^parallelism.module_fqns_per_model_part = .* not supp"):
        load_toml(path)


@pytest.mark.parametrize(
    "setting",
    [
        "activation_checkpoint.mode=memory_budget",
        "model.converters=quantize.linear.mx",
        "model.converters=mtp,quantize.grouped_mm.float8",
    ],
)
def test_an_unsupported_value_fails_by_name(setting):
    name, _, value = setting.partition("=")
    message = refusal(f"--{setting}")
    assert message.startswith(f"--{name}: expected ") and value.split(",")[-1] in message


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("training.local_batch_size=0", ">= 1"),
        ("training.global_batch_size=0", "-1 or >= 1"),
        ("training.global_batch_size=-2", "-1 or >= 1"),
        ("training.seq_len=0", ">= 1"),
        ("training.steps=0", ">= 1"),
        ("training.validation_fraction=0", "> 0 and < 1"),
        ("training.validation_fraction=1", "> 0 and < 1"),
        ("training.max_norm=0", "inf or > 0"),
        ("training.max_norm=nan", "inf or > 0"),
        ("optimizer.lr=0", "> 0"),
        ("optimizer.lr=nan", "> 0"),
        ("optimizer.lr=inf", "> 0"),
        ("optimizer.beta1=1", ">= 0 and < 1"),
        ("lr_scheduler.warmup_steps=-1", ">= 0"),
        ("lr_scheduler.decay_ratio=1.5", ">= 0 and <= 1"),
        ("parallelism.data_parallel_shard_degree=0", "-1 or >= 1"),
        ("checkpoint.load_step=-2", "-1 or >= 0"),
        ("checkpoint.keep_latest_k=1", "0 or >= 2"),
        ("validation.steps=0", "-1 or >= 1"),
        ("metrics.log_freq=0", ">= 1"),
        ("loss.softcap=0", "> 0"),
        ("loss.label_smoothing=1", ">= 0 and < 1"),
        ("mtp.num_future_tokens=0", ">= 1 and <= 1000"),
        ("mtp.loss_weights=1,-1,1", ">= 0"),
        ("mtp.loss_decay=0", "> 0 and <= 1"),
        ("mtp.loss_decay=1.1", "> 0 and <= 1"),
        ("mtp.loss_scale=-1", ">= 0"),
        ("mtp.target_weight=0", "> 0 and <= 1"),
        ("mtp.loss_scale_boundary=1.1", ">= 0 and <= 1"),
        ("mtp.curriculum_fraction=0", "> 0 and <= 1"),
    ],
)
def test_a_number_out_of_range(setting, expected):
    name = setting.partition("=")[0]
    message = refusal(*MTP, f"--{setting}")
    assert message.startswith(f"{name} = ")
    assert message.endswith(f": expected {expected}")


def test_an_infinite_norm_means_no_clipping():
    assert parse_args(["--training.max_norm=inf"]).training.max_norm == float("inf")


def test_every_number_of_an_option_in_use_has_a_range_that_its_default_is_in():
    for option in options(JobConfig).values():
        if type(option.default) in (int, float):
            assert option.rule.range_error(option.default) == "", option.name


@pytest.mark.parametrize(
    ("argv", "start"),
    [
        (
            ["--mtp.num_future_tokens=9", "--training.seq_len=8"],
            "mtp.num_future_tokens = 9: expected at most training.seq_len = 8",
        ),
        (
            ["--mtp.num_future_tokens=9", "--validation.enable", "--validation.seq_len=8"],
            "mtp.num_future_tokens = 9: expected at most validation.seq_len = 8",
        ),
        (["--mtp.share_weights"], 'mtp.share_weights = true: needs mtp.heads = "sequential"'),
        (["--mtp.trunk_state=raw"], 'mtp.trunk_state = "raw": needs mtp.heads = "sequential"'),
        (
            ["--mtp.match_parameters", "--mtp.heads=sequential"],
            'mtp.match_parameters = true: needs mtp.heads = "parallel"',
        ),
        (
            ["--mtp.loss_weights=1,2", "--mtp.num_future_tokens=1"],
            "mtp.loss_weights has 2 entries: expected none, or one for each of heads 2..n,"
            " num_future_tokens - 1 = 0\n",
        ),
        (
            ["--mtp.loss_weights=1", "--mtp.num_future_tokens=3"],
            "mtp.loss_weights has 1 entries: expected none, or one for each of heads 2..n,"
            " num_future_tokens - 1 = 2\n",
        ),
        (
            ["--mtp.loss_weights=1,2"],
            "mtp.loss_weights has 2 entries: expected none, or one for each of heads 2..n",
        ),
        (
            ["--mtp.loss_weights=1,2,3", "--mtp.loss_decay=0.6"],
            "mtp.loss_decay = 0.6: mtp.loss_weights = [1.0, 2.0, 3.0] has the weights of heads "
            "2..n already; unset one of them\n",
        ),
        (
            ["--mtp.train=heads", "--mtp.num_future_tokens=1"],
            'mtp.train = "heads": needs mtp.num_future_tokens of at least 2, found 1',
        ),
        (
            ["--mtp.target_loss=tv"],
            'mtp.target_loss = "tv": is of heads that learn from the trunk; set mtp.target',
        ),
        (
            ["--mtp.target_weight=0.5"],
            "mtp.target_weight = 0.5: is of heads that learn from the trunk; set mtp.target",
        ),
        (
            ["--mtp.train=trunk", "--mtp.detach_trunk"],
            "mtp.detach_trunk = true: nothing would learn from heads 2..n",
        ),
    ],
)
def test_combinations_of_mtp(argv, start):
    assert f"{refusal(*MTP, *argv)}\n".startswith(start)


SCHEDULED = ["--mtp.loss_scale_schedule", "linear"]


@pytest.mark.parametrize(
    ("argv", "start"),
    [
        (
            ["--mtp.loss_scale_final=0.5"],
            'mtp.loss_scale_final = 0.5: needs mtp.loss_scale_schedule = "linear" or "step": ',
        ),
        (
            [*SCHEDULED, "--mtp.loss_scale_boundary=0.5"],
            'mtp.loss_scale_boundary = 0.5: needs mtp.loss_scale_schedule = "step": no other',
        ),
        (
            ["--mtp.curriculum_fraction=0.3"],
            'mtp.curriculum_fraction = 0.3: needs mtp.curriculum = "forward" or "reverse": ',
        ),
        (
            ["--mtp.curriculum=reverse", "--mtp.train=heads"],
            'mtp.curriculum = "reverse": needs mtp.train = "all" or "trunk": while head 1 is alone',
        ),
        (
            ["--mtp.heads=medusa", "--mtp.init=copy_last_layer"],
            'mtp.init = "copy_last_layer": needs mtp.heads = "parallel" or "sequential": light',
        ),
        (
            ["--mtp.train=heads", "--mtp.loss_scale=0"],
            'mtp.loss_scale = 0.0: with mtp.train = "heads"',
        ),
        (
            [*SCHEDULED, "--mtp.loss_scale_final=0", "--mtp.train=heads", "--mtp.loss_scale=0"],
            'mtp.loss_scale = 0.0: with mtp.train = "heads"',
        ),
        (
            ["--mtp.train=heads", "--mtp.num_future_tokens=2", "--mtp.loss_weights=0"],
            'mtp.loss_weights = [0.0]: with mtp.train = "heads"',
        ),
        ([*SCHEDULED, "--mtp.train=heads", "--mtp.loss_scale=0"], ""),
        (["--mtp.curriculum=forward", "--mtp.curriculum_fraction=0.3"], ""),
    ],
)
def test_what_a_new_run_would_do_nothing_with(argv, start):
    """A file with it loads: an earlier version may have trained by it."""
    config = parse_args([*MTP, *argv])
    found = ""
    try:
        check_new_run(config)
    except UserError as error:
        found = str(error)
    assert bool(found) == bool(start) and found.startswith(start) and "\n" not in found


def test_logits_in_bfloat16_need_passes_that_read_them():
    message = refusal("--loss.bf16_logits")
    assert message.startswith('loss.bf16_logits = true: expected loss.passes "compiled"')
    assert parse_args(["--loss.bf16_logits", "--compile.enable"]).loss_passes == "compiled"
    message = refusal("--loss.passes", "triton", "--parallelism.tensor_parallel_degree", "2")
    assert message.startswith('loss.passes = "triton": its kernel reads whole rows of logits')
    assert "tensor_parallel_degree = 2" in message


@pytest.mark.parametrize(
    "argv",
    [
        ["--mtp.engine=head_by_head"],
        ["--mtp.heads=sequential", "--mtp.share_weights"],
        ["--mtp.match_parameters"],
        ["--mtp.loss_weights=1,2,3"],
        ["--mtp.loss_decay=0.6", "--mtp.loss_reduction=mean"],
        ["--mtp.num_future_tokens=1"],
        ["--mtp.num_future_tokens=8", "--training.seq_len=8"],
        ["--mtp.train=heads", "--mtp.init=copy_last_layer"],
        ["--mtp.train=trunk", "--mtp.loss_scale=0"],
        ["--mtp.target=trunk", "--mtp.target_loss=lk", "--mtp.target_weight=0.5"],
    ],
)
def test_combinations_of_mtp_that_are_fine(argv):
    assert parse_args([*MTP, *argv]).model.converters == ["mtp"]


@pytest.mark.parametrize(
    "text", ['[mtp]\nheads = "parallel"\n', "[mtp]\nnum_future_tokens = 4\n", "[mtp]"]
)
def test_a_table_without_its_converter_is_refused_even_at_its_defaults(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=r'^mtp(\.\w+)? is set but .* lacks "mtp"; add it'):
        load_toml(path)
    assert parse_args(["--job.config_file", str(path), *MTP]).model.converters == ["mtp"]


def test_mtp_without_its_converter_on_the_command_line_and_in_python():
    assert "lacks" in refusal("--mtp.num_future_tokens=2")
    assert refusal("--mtp.train=heads", "--mtp.num_future_tokens=1").startswith("mtp.train is set")
    config = JobConfig()
    config.mtp.num_future_tokens = 2
    with pytest.raises(UserError, match=r"^mtp\.num_future_tokens is set"):
        check(config)


def test_one_future_token_needs_no_converter():
    config = parse_args(["--mtp.num_future_tokens=1", "--mtp.heads=sequential"])
    assert config.model.converters == []


@pytest.mark.parametrize(
    "setting", ["model.converters=mtp,mtp", "model.converters=float8,quantize.linear.float8"]
)
def test_a_converter_twice(setting):
    assert refusal(f"--{setting}").endswith("an entry is there twice; remove one")


def test_float8():
    float8 = ["--model.converters=float8", "--quantize.linear.float8.enable_fsdp_float8_all_gather"]
    assert parse_args([*float8, "--quantize.linear.float8.recipe_name=tensorwise"])
    assert parse_args(float8)
    message = refusal(*float8, "--quantize.linear.float8.recipe_name=rowwise")
    assert message.endswith('needs recipe_name = "tensorwise", found "rowwise"')
    small = ["--model.converters=float8", "--quantize.linear.float8.filter_fqns"]
    recipe = "--quantize.linear.float8.recipe_name=rowwise_with_gw_hp"
    message = refusal(*small, "auto_filter_small_kn", recipe)
    assert message.startswith('quantize.linear.float8.filter_fqns has "auto_filter_small_kn"')


def test_every_list_of_words_is_held_against_what_there_is():
    """By its choices; or by the model, by the checkpoint, and as sources that have to be there."""
    lists = {name: option.type for name, option in options(JobConfig).items()}
    free = {name for name, kind in lists.items() if kind in (list[str], list[list[str]])}
    model, checkpoint = "quantize.linear.float8.filter_fqns", "checkpoint.exclude_from_loading"
    assert free == {model, checkpoint, "training.mixture"}


@pytest.mark.parametrize(
    ("argv", "start"),
    [
        (
            ["--training.global_batch_size=12"],
            "training.global_batch_size = 12: expected -1 or a multiple of "
            "training.local_batch_size = 8",
        ),
        (
            ["--profiling.enable_profiling", "--profiling.profile_freq=3"],
            "profiling.profile_freq = 3: expected at least profiler_warmup + profiler_active = 4",
        ),
        (
            ["--checkpoint.create_seed_checkpoint"],
            "checkpoint.create_seed_checkpoint = true: needs",
        ),
        (
            ["--activation_checkpoint.selective_ac_option=0"],
            'activation_checkpoint.selective_ac_option = "0": expected "op" or a positive number',
        ),
        (
            ["--activation_checkpoint.selective_ac_option=" + 5000 * "9"],
            f'activation_checkpoint.selective_ac_option = "{76 * "9"}...: expected "op" or a pos',
        ),
        (
            ["--compile.components=model,optimizer"],
            '--compile.components: expected a list with any of "model", "loss", found',
        ),
    ],
)
def test_other_combinations(argv, start):
    assert refusal(*argv).startswith(start)


def test_a_refused_combination_names_the_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[training]\nsteps = 0\n")
    message = refusal("--job.config_file", str(path))
    assert message == f"training.steps = 0: expected >= 1 (config file: {path})"
    with pytest.raises(UserError, match=r"^training\.steps = 0: expected >= 1 \(config file: "):
        load_toml(path)


def test_hugging_face_at_the_ends_of_a_run():
    message = refusal("--checkpoint.initial_load_in_hf", "--checkpoint.no_initial_load_model_only")
    assert "holds the weights only" in message


@pytest.mark.parametrize("argv", [["initial_load_in_hf"], ["initial_load_path", "runs/a"]])
def test_weights_that_would_not_be_loaded_are_refused(argv):
    """They were left unread without a word, and the run began from scratch."""
    message = refusal(f"--checkpoint.{argv[0]}", *argv[1:])
    assert message.startswith(f"checkpoint.{argv[0]} = ")
    assert "needs checkpoint.enable = true" in message


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            ["--training.seq_len", "2050"],
            "training.seq_len = 2050: expected a multiple of 8, for "
            "parallelism.context_parallel_degree = 4 gives .*; the nearest is 2048",
        ),
        (["--training.seq_len", "3"], "training.seq_len = 3: .*; the nearest is 8"),
        (
            ["--validation.enable", "--validation.seq_len", "2060"],
            "validation.seq_len = 2060: .*; the nearest is 2064",
        ),
        (["--model.name", "hf", "--model.hf_assets_path", "x"], 'model.name = "hf" has attention'),
        (
            [*MTP, *TAUGHT, "--mtp.num_future_tokens", "4", "--training.seq_len", "16"],
            "mtp.num_future_tokens = 4: .*; expected at most 3",
        ),
    ],
)
def test_sequences_that_ranks_cannot_share(more, expected):
    message = refusal("--parallelism.context_parallel_degree", "4", *more)
    assert re.search(expected, message) and "context_parallel_degree = " in message


def test_transformers_own_experts_are_its_own():
    hf = ("--model.name", "hf", "--model.hf_assets_path", "x")
    message = refusal("--parallelism.expert_parallel_degree", "2", *hf)
    assert message.startswith('parallelism.expert_parallel_degree = 2: model.name = "hf" has exp')


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            ["--training.seq_len", "1025"],
            "training.seq_len = 1025: expected a multiple of 3, for .* = 3 give .* is 1026",
        ),
        (
            ["--training.seq_len", "24", "--parallelism.context_parallel_degree", "2"],
            None,
        ),
        (
            ["--training.seq_len", "28", "--parallelism.context_parallel_degree", "2"],
            "a multiple of 12, for .* = 3 and context_parallel_degree = 2 give .* is 24",
        ),
        (
            ["--training.seq_len", "6", "--validation.enable", "--validation.seq_len", "1"],
            "validation.seq_len = 1: .*; the nearest is 3",
        ),
        (["--model.name", "hf", "--model.hf_assets_path", "x"], 'model.name = "hf" has blocks'),
    ],
)
def test_positions_that_ranks_cannot_share(more, expected):
    argv = ["--parallelism.tensor_parallel_degree", "3", *more]
    if expected is None:
        parse_args(argv)
    else:
        message = refusal(*argv)
        assert re.search(expected, message) and "tensor_parallel_degree = 3" in message
