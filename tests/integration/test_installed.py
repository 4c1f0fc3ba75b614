"""A wheel of this checkout, installed into an empty environment and used from an empty folder."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import tomli as tomllib
from check_readme import copy_checkout

ROOT = Path(__file__).resolve().parents[2]


def call(*command: str | Path, cwd: Path) -> str:
    """What a command that must succeed prints to stdout; nothing of the checkout is in its way."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1", "PIP_NO_CACHE_DIR": "1"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the console commands of an environment that has the wheel, and what else
    this Python has installed."""
    folder: Path = tmp_path_factory.mktemp("installed")
    copy_checkout(folder / "checkout")
    pip = sys.executable, "-m", "pip", "--disable-pip-version-check"
    wheel = "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, folder / "checkout"
    call(*pip, *wheel, cwd=folder)
    venv.create(folder / "environment", symlinks=True)
    (packages,) = (folder / "environment" / "lib").glob("python*/site-packages")
    # Not read for links of its own, so this checkout, installed as editable, is not among them.
    (packages / "outer.pth").write_text(
        "\n".join(path for path in sys.path if path.endswith("-packages"))
    )
    (file,) = folder.glob("*.whl")
    python = folder / "environment" / "bin" / "python"
    install = "install", "-q", "--no-deps", "--ignore-installed", file
    call(*pip, "--python", python, *install, cwd=folder)
    where = "import torchtitan_mtp as package; print(package.__path__[0])"
    assert call(python, "-c", where, cwd=folder).strip() == str(packages / "torchtitan_mtp")
    assert (packages / "torchtitan_mtp" / "py.typed").is_file()
    return python.parent


# Runs the programs named in its arguments, a JSON list of command lines, as each would by itself,
# but for the seconds that importing torch takes; a zero before what each prints.
IN_ONE_PROCESS = """
import json, runpy, sys
for command in json.loads(sys.argv[1]):
    sys.argv = command
    print(end=chr(0))
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, command
"""


@pytest.mark.slow
def test_a_model_trains_decodes_leaves_and_comes_back(programs: Path, tmp_path: Path) -> None:
    """The commands find the recipe and each other's folders without the checkout."""

    def command(name: str, *arguments: str) -> list[str]:
        return [str(programs / f"torchtitan-mtp-{name}"), *arguments]

    small = "--training.steps=2", "--training.seq_len=32", "--model.args.n_layers=2"
    prompt = "--prompt", "def ", "--max_new_tokens=8"
    commands = [
        command(
            "train", "--job.config_file", "quickstart.toml", *small, "--validation.enable=false"
        ),
        command("generate", "outputs/quickstart", *prompt, "--speculative"),
        command("export", "outputs/quickstart", "outputs/meta", "--format=meta"),
        command("import", "outputs/meta", "outputs/back", "--format=meta"),
        command("generate", "outputs/back", *prompt),
    ]
    said = call(programs / "python", "-c", IN_ONE_PROCESS, json.dumps(commands), cwd=tmp_path)
    _, _, drafted, _, _, plain = said.split("\0")
    assert drafted.startswith("def ") and drafted == plain  # greedy
    assert call(*command("train", "--help"), cwd=tmp_path).startswith("usage: ")


def test_every_command_is_a_function() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert len(project["scripts"]) == 5
    for entry in project["scripts"].values():
        module, _, function = entry.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
