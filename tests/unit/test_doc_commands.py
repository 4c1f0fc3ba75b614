"""Commands that the documentation and the recipes show are ones that the programs take.

What runs: blocks marked `bash run` (scripts/check_readme.py), and docs/extending.md, by its test.
"""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import experiment
import pytest

from torchtitan_mtp.config import parse_args

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    ROOT / "README.md",
    *sorted(set((ROOT / "docs").glob("*.md")) - {ROOT / "docs/extending.md"}),
    *sorted((ROOT / "train_configs").glob("*.toml")),
]
TRAIN = re.compile(r"(?:run_train\.sh|-m torchtitan_mtp\.train|multinode\.slurm)(?= )(.*)")
PROGRAM = re.compile(
    r"python scripts/(generate|evaluate|export_checkpoint|import_checkpoint)\.py(.*)"
)
EXPERIMENT = re.compile(r"python scripts/experiment\.py(.*)")


def commands(file: Path) -> list[str]:
    """Those that begin a line, each on one line; a [--part] only says what may be given."""
    text = re.sub(r"\\\n#?\s*", "", file.read_text(encoding="utf-8"))
    lines = (line.lstrip("# ") for line in text.splitlines())
    shown = [x for x in lines if re.match(r"NGPU=|\./run_train|torchrun |sbatch |python ", x)]
    return [line for line in shown if "[--" not in line]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_commands_are_taken(file: Path) -> None:
    for command in commands(file):
        if train := TRAIN.search(command):
            parse_args(shlex.split(train[1], comments=True))
        if program := PROGRAM.match(command):
            module = importlib.import_module(f"torchtitan_mtp.cli.{program[1]}")
            module.parse_arguments(shlex.split(program[2], comments=True))
        if tried := EXPERIMENT.match(command):
            experiment.parse_arguments(shlex.split(tried[1], comments=True))


def test_every_path_has_its_commands() -> None:
    """docs/paths.md: five ways, each with a command, a recipe or program, and where to read on."""
    page = (ROOT / "docs/paths.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", page, flags=re.M)[1:]
    assert [section.partition("\n")[0] for section in sections] == [
        *("Pre-train", "Add heads to a model", "Tune native modules", "Serve", "Scale"),
    ]
    for section in sections:
        assert "```bash\n" in section and re.search(r"^Next: .*\.md", section, re.M)
    assert len(commands(ROOT / "docs/paths.md")) > 10
