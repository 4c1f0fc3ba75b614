import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from torchtitan_mtp.config import parse_args
from torchtitan_mtp.data.mixture import parse_entry

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "data.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
TRAININGS = re.findall(r"^    \./run_train\.sh (.*)$", TEXT, re.MULTILINE)


@pytest.mark.parametrize("block", BLOCKS)
def test_examples_run(block, capsys):
    exec(block, {})
    # What the first one claims it asserts; the other prints rates.
    assert "assert " in block or "tokens a second" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", TRAININGS)
def test_trainings_parse(arguments):
    training = parse_args(shlex.split(arguments)).training
    assert training.dataset_path or list(map(parse_entry, training.mixture))


def test_tokenizer_command(tmp_path):
    (command,) = re.findall(r"^    python (scripts/train_tokenizer\.py .*)$", TEXT, re.MULTILINE)
    arguments = command.replace("outputs/", f"{tmp_path}/").replace("8192", "300")
    text = tmp_path / "text.txt"
    text.write_text("so much text, so little time; " * 99 + "".join(map(chr, range(32, 1000))))
    arguments = arguments.replace("python_stdlib", str(text))
    done = subprocess.run(
        [sys.executable, *shlex.split(arguments)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "py.tiktoken").read_text().count("\n") == 298


def test_every_block_is_found():
    assert len(BLOCKS) == 2
    assert len(TRAININGS) == 3
