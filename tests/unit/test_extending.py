"""docs/extending.md: its files, diffs and commands, in a copy of the checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from check_readme import FENCE, ROOT, copy_checkout

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


def run(commands: str, checkout: Path) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-e", "-c", commands],
        cwd=checkout,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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
