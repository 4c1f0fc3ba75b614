"""docs/extending.md: its files, diffs and commands, in a copy of the checkout."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from check_readme import FENCE, ROOT, copy_checkout

import forked

PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all sections: each adds to what those before it have added."""
    folder = tmp_path_factory.mktemp("checkout")
    copy_checkout(folder)
    return folder


def apply(diff: str, checkout: Path) -> None:
    """Hunks without line numbers: what each replaces stands in its file once."""
    for name, body in re.findall(r"^--- (\S+)\n(.*?)(?=^--- |\Z)", diff, re.M | re.S):
        text = (checkout / name).read_text(encoding="utf-8")
        for hunk in body.split("@@\n"):
            lines = hunk.splitlines(keepends=True)
            old = "".join(line[1:] for line in lines if line[0] != "+")
            new = "".join(line[1:] for line in lines if line[0] != "-")
            assert text.count(old) == 1, f"{name} holds this {text.count(old)} times:\n{old}"
            text = text.replace(old, new)
        (checkout / name).write_text(text, encoding="utf-8")


def commands(block: str) -> Iterator[str]:
    """One after another, each with all its lines."""
    command = ""
    for line in block.replace("\\\n", "").splitlines(keepends=True):
        command += line
        if command.count("'") % 2 == 0:  # a quotation goes on over lines
            yield command
            command = ""


def run(block: str, checkout: Path) -> str:
    """What its commands print. What isn't Python is for bash."""
    printed = []
    for command in commands(block):
        words = shlex.split(command)
        if words[0] == "python":
            done = forked.python(words[1:], checkout)
        else:
            bash = ["bash", "-c", command]
            done = subprocess.run(bash, cwd=checkout, text=True, capture_output=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        printed.append(done.stdout)
    return "".join(printed)


@pytest.mark.parametrize("section", SECTIONS)
def test_an_extension_is_what_the_page_says(checkout: Path, section: str) -> None:
    printed, kinds = "", []
    for block in FENCE.finditer(SECTIONS[section]):
        kind, body = block["info"], block["body"]
        kinds.append(kind)
        if kind == "python":
            (checkout / body.partition("\n")[0].removeprefix("# ")).write_text(body)
        elif kind == "diff":
            apply(body, checkout)
        elif kind == "bash":
            printed = run(body, checkout)
        else:
            assert kind == "text" and printed.endswith(body), printed
    assert {"diff", "bash"} <= set(kinds)
    if section == "A head family":
        assert re.search(r"\b[1-9]\d* passed", printed), printed  # the naive gradients among them
