"""Files with the words of earlier versions mean what they meant, and a line of log says so."""

import logging

import pytest

from torchtitan_mtp.config import load_toml, parse_args
from torchtitan_mtp.config.earlier import _say
from torchtitan_mtp.errors import UserError

CHAIN = 'heads = "sequential"'
FILES = {  # lines of [mtp], of [loss], and today's engine with what the log says, if anything
    "renamed": ('engine = "sequential"', "", "head_by_head", "is called"),
    "renamed, of a chain": (f'{CHAIN}\nengine = "sequential"', "", "head_by_head", "is called"),
    "a chain's default": (f'{CHAIN}\nengine = "joint"', "", "head_by_head", "the same gradients"),
    "the one loss": ("", 'backend = "chunked"', "head_by_head", ""),
    "whole logits": ('engine = "joint"', 'backend = "naive"', "joint", "in chunks now"),
    "torch's loss": ("", 'backend = "torch"', "head_by_head", "in chunks now"),
    "joint": ('engine = "joint"', "", "joint", ""),
    "default": ("", "", "head_by_head", ""),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_earlier(name, tmp_path, caplog):
    mtp, loss, engine, line = FILES[name]
    path = tmp_path / "run.toml"
    path.write_text(f'[model]\nconverters = ["mtp"]\n[mtp]\n{mtp}\n[loss]\n{loss}\n')
    _say.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert load_toml(path).mtp.engine == engine
        assert parse_args(["--job.config_file", str(path)]).mtp.engine == engine
    assert [line in record.getMessage() for record in caplog.records] == [True] * bool(line)
    assert all(record.getMessage().startswith(f"{path}: ") for record in caplog.records)


def test_a_command_line_has_todays_words():
    heads = ["--model.converters", "mtp", "--mtp.heads", "sequential", "--mtp.engine"]
    with pytest.raises(UserError, match='expected one of "head_by_head", "joint"'):
        parse_args([*heads, "sequential"])
    with pytest.raises(UserError, match=r'sequential" has one way; set mtp\.engine = "head'):
        parse_args([*heads, "joint"])
    with pytest.raises(UserError, match=r"--loss\.backend"):
        parse_args(["--loss.backend", "chunked"])


def test_a_loss_that_never_was(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[loss]\nbackend = "fastest"\n')
    with pytest.raises(UserError, match=r"run.toml: .*loss.backend"):
        load_toml(path)
