"""The command line: TorchTitan's spellings, help, and one line for whatever is wrong."""

import re

import pytest

from torchtitan_mtp.config import JobConfig, parse_args
from torchtitan_mtp.config.setting import options
from torchtitan_mtp.errors import UserError


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_args(list(argv))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_no_argument_gives_the_defaults():
    assert parse_args([]) == JobConfig()


@pytest.mark.parametrize(
    "argv",
    [
        ["--training.local_batch_size", "3"],
        ["--training.local_batch_size=3"],
        ["--training.local-batch-size", "3"],
        ["--training.local-batch-size=3"],
        ["--training.local_batch_size", "4", "--training.local_batch_size", "3"],
    ],
)
def test_spellings_of_a_value(argv):
    assert parse_args(argv).training.local_batch_size == 3


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--checkpoint.initial_load_model_only"], True),
        (["--checkpoint.no_initial_load_model_only"], False),
        (["--checkpoint.no-initial-load-model-only"], False),
        (["--checkpoint.initial_load_model_only", "false"], False),
        (["--checkpoint.initial_load_model_only", "True"], True),
        (["--checkpoint.initial_load_model_only=false"], False),
        (["--checkpoint.initial_load_model_only", "--training.steps", "5"], True),
    ],
)
def test_spellings_of_a_boolean(argv, expected):
    assert parse_args(argv).checkpoint.initial_load_model_only is expected


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--model.converters", "mtp"], ["mtp"]),
        (["--model.converters=mtp,float8"], ["mtp", "quantize.linear.float8"]),
        (["--model.converters", "mtp, quantize.linear.float8"], ["mtp", "quantize.linear.float8"]),
        (["--model.converters", ""], []),
    ],
)
def test_lists_are_comma_separated(argv, expected):
    assert parse_args(argv).model.converters == expected


def test_values_of_every_type():
    config = parse_args(
        [
            "--parallelism.data_parallel_shard_degree",
            "-1",
            "--optimizer.lr=1e-3",
            "--training.max_norm",
            "2",
            "--lr_scheduler.decay_ratio",
            "0.5",
            "--training.seed=None",
            "--job.description",
            "two words = one value",
            "--quantize.linear.float8.recipe_name",
            "rowwise",
            "--model.converters=mtp",
            "--mtp.loss_weights=1,0.5,0.25",
        ]
    )
    assert config.parallelism.data_parallel_shard_degree == -1
    assert config.optimizer.lr == 1e-3
    assert type(config.training.max_norm) is float
    assert config.lr_scheduler.decay_ratio == 0.5
    assert config.training.seed is None
    assert config.job.description == "two words = one value"
    assert config.quantize.linear.float8.recipe_name == "rowwise"
    assert config.mtp.loss_weights == [1.0, 0.5, 0.25]


def test_an_optional_flag_is_a_flag():
    args = parse_args(["--model.args.tied_embeddings", "--model.args.no_qk_norm"]).model.args
    assert (args.tied_embeddings, args.qk_norm, args.qkv_bias) == (True, False, None)


def test_other_v0_2_names_work_here_too():
    assert parse_args(["--debug.seed", "3", "--debug.deterministic"]).training.seed == 3


@pytest.mark.parametrize("spelling", ["--job.config_file", "--job.config-file"])
@pytest.mark.parametrize("equals", [True, False])
def test_the_config_file_in_both_spellings(tmp_path, spelling, equals):
    path = tmp_path / "run.toml"
    path.write_text("[training]\nsteps = 7\n")
    argv = [f"{spelling}={path}"] if equals else [spelling, str(path)]
    assert parse_args(argv).training.steps == 7


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["--training.step", "5"],
            "command line: unknown option --training.step; did you mean --training.steps?",
        ),
        (
            ["--chekpoint.enable"],
            "command line: unknown option --chekpoint.enable; did you mean --checkpoint.enable?",
        ),
        (["--lr", "5"], "command line: unknown option --lr; did you mean --optimizer.lr?"),
        (
            ["--float8.emulate"],
            "command line: unknown option --float8.emulate; did you mean "
            "--quantize.linear.float8.emulate?",
        ),
        (
            ["--xyzzy"],
            "command line: unknown option --xyzzy; docs/config.md lists all options",
        ),
        (["train"], "command line: found 'train' where an option --section.key belongs"),
        (["-x"], "command line: found '-x' where an option --section.key belongs"),
        (
            ["--training", "x"],
            "--training is a table; name one of its keys, as in --training.key value",
        ),
        (["--training.steps"], "--training.steps: expected an integer after it, found nothing"),
        (
            ["--training.steps", "--compile.enable"],
            "--training.steps: expected an integer after it, found nothing",
        ),
        (
            ["--training.steps", "five"],
            '--training.steps: expected an integer, found "five" (string)',
        ),
        (
            ["--compile.enable=maybe"],
            '--compile.enable: expected true or false, found "maybe" (string)',
        ),
        (
            ["--compile.no_enable=true"],
            "--compile.no_enable: takes no value, found 'true'; write --compile.enable=true",
        ),
        (
            ["--mtp.heads", "chain"],
            '--mtp.heads: expected one of "parallel", "sequential", "medusa", found "chain"',
        ),
        (
            ["--job.config_file", "no.toml"],
            "no.toml: no such file; found by name: add_heads_hf.toml, debug_deepseek_v3.toml, ",
        ),
        (
            ["--training.no_steps"],
            "command line: unknown option --training.no_steps; did you mean ",
        ),
    ],
)
def test_what_is_wrong_is_one_line(argv, expected):
    assert refusal(*argv).startswith(expected)


def test_help_shows_every_option_as_it_is_read(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_args(["--training.steps", "5", "--help"])
    assert stopped.value.code == 0
    shown = set(re.findall(r"--([a-z0-9_.]+)", capsys.readouterr().out))
    keys = {o.name: o for o in options(JobConfig).values() if not o.is_table}
    negations = {
        ".".join((*o.path[:-1], "no_" + o.path[-1])) for o in keys.values() if o.type is bool
    }
    assert shown == set(keys) | negations | {"help", "job.config_file"}
