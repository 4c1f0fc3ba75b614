"""TOML files: precedence, types, names, and one line for whatever is wrong."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest
import transformers

from torchtitan_mtp.config import JobConfig, load_toml, parse_args, to_toml
from torchtitan_mtp.config.names import ELSEWHERE
from torchtitan_mtp.config.setting import options
from torchtitan_mtp.config.torchtitan import known_options
from torchtitan_mtp.errors import UserError


@pytest.fixture
def write(tmp_path):
    """Writes a run.toml and gives its path."""

    def write_text(text: str | bytes) -> Path:
        path = tmp_path / "run.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_text


def refusal(path: Path) -> str:
    """The message of a file that is refused: one line that names the file."""
    with pytest.raises(UserError) as caught:
        load_toml(path)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(path), "run.toml")


def test_defaults_are_torchtitans():
    config = JobConfig()
    assert config.training.local_batch_size == 8
    assert config.training.global_batch_size == -1
    assert config.training.seq_len == 2048
    assert config.training.mixed_precision_param == "bfloat16"
    assert config.optimizer.lr == 8e-4
    assert (config.optimizer.beta1, config.optimizer.beta2) == (0.9, 0.95)
    assert config.lr_scheduler.warmup_steps == 200
    assert config.lr_scheduler.decay_ratio is None
    assert config.checkpoint.keep_latest_k == 10
    assert config.checkpoint.last_save_model_only is True
    assert config.activation_checkpoint.selective_ac_option == "2"
    assert config.compile.components == ["model", "loss"]
    assert config.parallelism.data_parallel_shard_degree == -1
    assert config.profiling.profiler_warmup == 3
    assert config.comm.train_timeout_seconds == 100


def test_values_of_a_file_replace_defaults_and_no_others(write):
    path = write(
        '[training]\nsteps = 7\nmax_norm = 2\n[compile]\ncomponents = ["loss"]\n'
        '[quantize.linear.float8]\nrecipe_name = "rowwise"\nfilter_fqns = ["output", "wq"]\n'
    )
    expected = JobConfig()
    expected.training.steps = 7
    expected.training.max_norm = 2.0
    expected.compile.components = ["loss"]
    expected.quantize.linear.float8.recipe_name = "rowwise"
    expected.quantize.linear.float8.filter_fqns = ["output", "wq"]
    config = load_toml(path)
    assert config == expected
    assert type(config.training.max_norm) is float


def test_default_lists_are_not_shared():
    JobConfig().compile.components.append("x")
    assert JobConfig().compile.components == ["model", "loss"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "[training]\nseq_length = 3\n",
            "run.toml: unknown key training.seq_length; did you mean training.seq_len?",
        ),
        (
            "[trainning]\nsteps = 3\n",
            "run.toml: unknown table trainning; did you mean training?",
        ),
        (
            "[training]\nlr = 3e-4\n",
            "run.toml: unknown key training.lr; did you mean optimizer.lr?",
        ),
        (
            "[training]\nlearning_rate = 3e-4\n",
            "run.toml: unknown key training.learning_rate; did you mean optimizer.lr?",
        ),
        (
            "learning_rate = 3e-4\n",
            "run.toml: unknown key learning_rate; did you mean optimizer.lr?",
        ),
        (
            "[optimizer]\nmax_grad_norm = 1.0\n",
            "run.toml: unknown key optimizer.max_grad_norm; did you mean training.max_norm?",
        ),
        (
            "[model.args]\nhidden_size = 1\n",
            "run.toml: unknown key model.args.hidden_size; did you mean model.args.dim?",
        ),
        (
            "[training]\nzzzzz = 1\n",
            "run.toml: unknown key training.zzzzz; docs/config.md lists all keys",
        ),
        ("[mpt]\nheads = 'parallel'\n", "run.toml: unknown table mpt; did you mean mtp?"),
        (
            "[mtp]\nnum_future_token = 3\n",
            "run.toml: unknown key mtp.num_future_token; did you mean mtp.num_future_tokens?",
        ),
        ("steps = 3\n", "run.toml: unknown key steps; did you mean "),
        ("[zzz.qqq]\n", "run.toml: unknown table zzz; docs/config.md lists all tables"),
        ('["a\\nb"]\n', "run.toml: unknown table 'a\\nb'; docs/config.md lists all tables"),
    ],
)
def test_an_unknown_name_gets_the_nearest_right_one(write, text, expected):
    assert refusal(write(text)).startswith(expected)


def test_words_of_others_mean_keys_that_are_there():
    """And are none of ours. Hugging Face's are arguments of its Trainer: those of them that say how
    long, how large and how fast are there."""
    known = known_options()
    words = {word: ours for ours, theirs in ELSEWHERE.items() for word in theirs.split()}
    assert len(words) == sum(len(theirs.split()) for theirs in ELSEWHERE.values())
    assert {*ELSEWHERE} <= {*known} and not {*words} & {
        option.path[-1] for option in known.values() if not option.is_table
    }
    arguments = {argument.name for argument in dataclasses.fields(transformers.TrainingArguments)}
    trainers = "learning_rate max_steps num_train_epochs per_device_train_batch_size max_grad_norm"
    trainers += " gradient_accumulation_steps output_dir"
    assert {*trainers.split()} <= arguments & words.keys()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "[training]\nsteps = '5'",
            'training.steps: expected an integer, found "5" (string)',
        ),
        ("[training]\nsteps = 5.0", "training.steps: expected an integer, found 5.0 (number)"),
        ("[training]\nsteps = true", "training.steps: expected an integer, found true (boolean)"),
        ("[optimizer]\nlr = true", "optimizer.lr: expected a number, found true (boolean)"),
        ("[optimizer]\nlr = '1e-3'", 'optimizer.lr: expected a number, found "1e-3" (string)'),
        ("[compile]\nenable = 1", "compile.enable: expected true or false, found 1 (integer)"),
        ("[model]\nflavor = 8", "model.flavor: expected a string, found 8 (integer)"),
        (
            "[model]\nconverters = 'mtp'",
            'model.converters: expected a list with any of "mtp", "quantize.linear.float8", '
            'found "mtp" (string)',
        ),
        (
            "[model]\nconverters = ['mpt']",
            'model.converters: expected a list with any of "mtp", "quantize.linear.float8", '
            'found ["mpt"] (list)',
        ),
        (
            "[mtp]\nloss_weights = [1.0, true]",
            "mtp.loss_weights: expected a list of numbers, found [1.0, true] (list)",
        ),
        (
            "[mtp]\nheads = 'chain'",
            'mtp.heads: expected one of "parallel", "sequential", "medusa", found "chain" (string)',
        ),
        (
            "[mtp.heads]\nx = 1",
            'mtp.heads: expected one of "parallel", "sequential", "medusa", found {"x": 1} (table)',
        ),
        (
            "[training]\nsteps = 2020-01-01",
            'training.steps: expected an integer, found "2020-01-01" (date)',
        ),
        ("training = 5", "[training] is a table, found a value; write [training]"),
        ("[[training]]\nsteps = 1", "[training] is a table, found a value; write [training]"),
    ],
)
def test_a_wrong_type_says_what_was_found_and_expected(write, text, expected):
    assert refusal(write(text)) == f"run.toml: {expected}"


def test_a_long_value_is_cut(write):
    assert len(refusal(write(f"[training]\nsteps = '{'x' * 5000}'"))) < 200


@pytest.mark.parametrize("key", ["training.steps", "optimizer.lr", "model.flavor"])
def test_an_integer_that_python_does_not_write(write, key):
    """One of more than 4300 digits, which it reads in hexadecimal."""
    table, name = key.split(".")
    message = refusal(write(f"[{table}]\n{name} = 0x{'f' * 5000}"))
    assert key in message and "thousands of digits" in message


def test_malformed_toml_names_file_and_line(write):
    message = refusal(write("[training]\nsteps = 3\nseq_len == 4\n"))
    assert message.startswith("run.toml: not valid TOML: ")
    assert "line 3" in message


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"a = " + b"[" * 20_000, b"a = " + b"9" * 5000, b"[training", b"\x00"]
)
def test_any_broken_file_is_one_line(write, content):
    assert refusal(write(content)).startswith("run.toml: ")


def test_a_byte_order_mark_is_passed_over(write):
    """As editors on Windows begin a file."""
    assert load_toml(write(b"\xef\xbb\xbf[training]\r\nsteps = 7\r\n")).training.steps == 7


def test_a_missing_file_and_a_folder(tmp_path):
    no_file = "run.toml: no such file; found by name: add_heads_hf.toml, debug_deepseek_v3.toml, "
    assert refusal(tmp_path / "no.toml").startswith(no_file)
    assert "can't be read: Is a directory" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[checkpoint]\nenable_checkpoint = true", "checkpoint.enable"),
        ("[checkpoint]\nlast_save_model_weights_only = true", "checkpoint.last_save_model_only"),
        (
            "[checkpoint]\ninitial_load_model_weights_only = true",
            "checkpoint.initial_load_model_only",
        ),
        ("[checkpoint]\nmodel_weights_only = true", "checkpoint.last_save_model_only"),
        ("[training]\ncompile = true", "compile.enable"),
        ("[training]\nwarmup_steps = 1", "lr_scheduler.warmup_steps"),
        ("[training]\ndata_parallel_shard_degree = 1", "parallelism.data_parallel_shard_degree"),
        ("[training]\nbatch_size = 1", "training.local_batch_size"),
        ("[training]\ntensor_parallel_degree = 1", "parallelism.tensor_parallel_degree"),
        ("[experimental]\npipeline_parallel_degree = 1", "parallelism.pipeline_parallel_degree"),
        (
            "[experimental]\nenable_compiled_autograd = true",
            "parallelism.enable_compiled_autograd",
        ),
        ("[float8]\nfilter_fqns = []", "quantize.linear.float8"),
        ("[mx]\nfilter_fqns = []", "quantize.linear.mx"),
        ("[optimizer]\nfused = true", "optimizer.implementation"),
        ("[lr_scheduler]\nlr_min = 0.1", "lr_scheduler.min_lr_factor"),
        ("[job]\nprint_args = true", "job.print_config"),
    ],
)
def test_a_renamed_key_names_its_new_place(write, old, new):
    assert refusal(write(old)).endswith(f"; did you mean {new}?")


def test_other_names_of_keys_are_free():
    known = options(JobConfig)
    names = [name for option in known.values() for name in option.rule.also_named]
    assert len({*names} - {*known}) == len(names) >= 3


def test_other_v0_2_names_of_a_key_are_read(write):
    config = load_toml(write("[debug]\nseed = 5\n[model]\ntokenizer_path = 'tok'\n"))
    assert config.training.seed == 5
    assert config.model.hf_assets_path == "tok"


def test_two_names_of_one_key_are_refused(write):
    message = refusal(write("[training]\nseed = 1\n[debug]\nseed = 2\n"))
    assert (
        message
        == "run.toml: training.seed and debug.seed are two names of one key; keep one of them"
    )


def test_float8_is_another_spelling(write):
    config = load_toml(write("[model]\nconverters = ['mtp', 'float8']\n"))
    assert config.model.converters == ["mtp", "quantize.linear.float8"]


def test_command_line_over_file_over_default(write):
    path = write("[training]\nsteps = 7\nseq_len = 64\n[compile]\nenable = true\n")
    config = parse_args(
        ["--training.steps", "9", "--job.config_file", str(path), "--compile.no_enable"]
    )
    assert config.training.steps == 9
    assert config.training.seq_len == 64
    assert config.compile.enable is False
    assert config.training.local_batch_size == 8
    assert config.job.config_file == str(path)


def test_round_trip_of_a_configuration_with_every_kind_of_value(write):
    config = JobConfig()
    config.job.description = 'quotes " \\ and \n, tab \t, DEL \x7f, é, 漢, 🙂, \x01'
    config.job.config_file = "a.toml"
    config.model.converters = ["mtp", "quantize.linear.float8"]
    config.mtp.loss_weights = [1.0, 1e-30, 0.1 + 0.2]
    config.optimizer.lr = 1.2345678901234567e-5
    config.training.max_norm = float("inf")
    config.training.seed = 2**63 - 1
    config.lr_scheduler.decay_ratio = 0.25
    config.checkpoint.exclude_from_loading = ["optimizer", "a,b"]
    config.quantize.linear.float8.recipe_name = "rowwise"
    assert load_toml(write(to_toml(config))) == config


def test_round_trip_of_the_defaults(write):
    text = to_toml(JobConfig())
    assert load_toml(write(text)) == JobConfig()
    assert "[training]\n" in text
    assert "\nsteps = 10000\n" in text


def test_none_is_the_default_of_every_key_that_may_be_none():
    # to_toml leaves None out: only as the default does it come back.
    for option in options(JobConfig).values():
        if "None" in str(option.type):
            assert option.default is None, option.name


def test_home_in_every_path(tmp_path, write, monkeypatch):
    """ "~" as a shell has it, in a file and on the command line, for every key that names a file or
    folder; what config.toml shows is the whole path, and URLs stay."""
    monkeypatch.setenv("HOME", str(tmp_path))
    known = options(JobConfig)
    paths = {
        name for name, option in known.items() if re.search(r"(_|\.)(folder|path|file)$", name)
    }
    assert len(paths) == 11
    lines = "checkpoint.enable = true\n"
    lines += "".join(f'{name} = "~/a b/{name}"\n' for name in paths if name != "job.config_file")
    config = parse_args(["--job.config_file", f"~/{write(lines).name}"])
    paths.remove("job.config_file")
    assert config.job.config_file == str(tmp_path / "run.toml")
    assert {n: known[n].get(config) for n in paths} == {n: f"{tmp_path}/a b/{n}" for n in paths}
    assert "~" not in to_toml(config)
    for name in paths:
        argv = ["--checkpoint.enable", "--model.flavor=~", "--checkpoint.folder=s3://~/x"]
        argv.insert(0, f"--{name}=~/x")
        config = parse_args(argv)
        expected = "s3://~/x" if name == "checkpoint.folder" else f"{tmp_path}/x"
        assert (known[name].get(config), config.model.flavor) == (expected, "~")


@pytest.mark.parametrize(
    ("script", "arguments", "names"),
    [
        ("generate", ["~/x", "--prompt_file=~/x"], ["checkpoint", "prompt_file"]),
        (
            "evaluate",
            ["~/x", *(f"--{name}=~/x" for name in ("source", "include_path", "json", "plot"))],
            ["checkpoint", "source", "include_path", "json", "plot"],
        ),
        ("export_checkpoint", ["~/x", "~/x", "--format=hf"], ["checkpoint", "out"]),
        (
            "import_checkpoint",
            ["~/x", "~/x", "--format=hf", "--config=~/x"],
            ["source", "out", "config"],
        ),
    ],
)
def test_home_in_the_arguments_of_scripts(script, arguments, names, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args = vars(importlib.import_module(f"torchtitan_mtp.cli.{script}").parse_arguments(arguments))
    assert {name: str(args[name]) for name in names} == dict.fromkeys(names, "/home/me/x")


def test_here_is_the_folder_of_the_file(tmp_path, write, monkeypatch):
    (tmp_path / "words").mkdir()
    path = write('[job]\ndump_folder = "{here}"\n[model]\nhf_assets_path = "{here}/words"\n')
    monkeypatch.chdir(tmp_path.parent)
    for name in (path, path.relative_to(tmp_path.parent)):
        config = parse_args(["--job.config_file", str(name)])
        assert config.job.dump_folder == str(tmp_path)
        assert config.model.hf_assets_path == str(tmp_path / "words")
    # What is there is written so; what is not there, or elsewhere, as it is.
    config.training.dataset_path = str(tmp_path / "none")
    config.checkpoint.initial_load_path = f"{tmp_path.parent}/words"
    config.checkpoint.folder = "words"  # below job.dump_folder
    monkeypatch.chdir(tmp_path)
    text = to_toml(config, str(tmp_path))
    assert 'dump_folder = "{here}"' in text and 'hf_assets_path = "{here}/words"' in text
    assert f'dataset_path = "{tmp_path}/none"' in text and '\nfolder = "words"' in text
    assert f'initial_load_path = "{tmp_path.parent}/words"' in text
    assert "{here}" not in to_toml(config)
    assert load_toml(write('[job]\ndump_folder = "{hereby}"\n')).job.dump_folder == "{hereby}"


def test_a_path_that_is_not_utf8_is_named():
    config = parse_args(["--training.dataset_path", "/data/caf\udce9"])  # as argv has the byte E9
    with pytest.raises(UserError) as caught:
        to_toml(config)
    start = r'training.dataset_path = "/data/caf\udce9": is not UTF-8'
    assert str(caught.value).startswith(start) and str(caught.value).isascii()
