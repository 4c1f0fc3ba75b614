"""Imports point one way: a folder imports only from folders before it in ORDER."""

import ast
from pathlib import Path

import pytest

PACKAGE = "torchtitan_mtp"
ROOT = Path(__file__).resolve().parents[2] / PACKAGE
ORDER = [
    "errors",
    "writing",
    "transfer",
    "config",
    "ops",
    "data",
    "models",
    "mtp",
    "build",
    "distributed",
    "checkpoint",
    "formats",
    "inference",
    "monitoring",
    "optimizer",
    "nonfinite",
    "validation",
    "trainer",
    "train",
    "cli",
]
# Closer than the order: what these import of the package, besides themselves.
ONLY = {
    "config": {"errors"},
    "ops": {"errors"},
    "models": {"errors", "ops", "data"},  # they know shapes, never the job's config
}


def imported_modules(tree: ast.AST, package: str) -> list[tuple[int, str, int]]:
    """(line, absolute dotted name, level) of every import, wherever in the file it stands."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            base += [node.module] if node.module else []
            # `from torchtitan_mtp import mtp` imports the folder that the name says.
            found += [
                (node.lineno, ".".join([*base, alias.name]), node.level) for alias in node.names
            ]
    return found


def violations(source: str, file: str) -> list[str]:
    """What a file (path below the package) imports against the order, one line each."""
    own = Path(file).parts[0].removesuffix(".py")
    package = ".".join([PACKAGE, *Path(file).parts[:-1]])
    found: list[str] = []
    for line, name, level in imported_modules(ast.parse(source), package):
        if level > 1:
            found.append(f"{file}:{line}: a relative import climbs out of its folder")
            continue
        parts = name.split(".")
        if parts[0] != PACKAGE or len(parts) == 1:
            continue
        other = parts[1]
        if other == own:
            continue
        if own == "__init__":
            found.append(f"{file}:{line}: the package itself imports {other}; it imports nothing")
        elif own not in ORDER or other not in ORDER:
            found.append(f"{file}:{line}: {own} imports {other}: one is not in the order")
        elif other not in ONLY.get(own, ORDER[: ORDER.index(own)]):
            found.append(f"{file}:{line}: {own} must not import {other}")
    return list(dict.fromkeys(found))  # one line may import several names


FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_imports_point_one_way(file: str) -> None:
    assert violations((ROOT / file).read_text(encoding="utf-8"), file) == []


def test_every_folder_and_file_has_its_place_in_the_order() -> None:
    assert {Path(file).parts[0].removesuffix(".py") for file in FILES} <= {"__init__", *ORDER}


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("ops/loss.py", "from torchtitan_mtp.config import JobConfig"),
        ("config/job.py", "import torchtitan_mtp.ops.loss"),
        ("models/layers.py", "from torchtitan_mtp.config import JobConfig"),
        ("mtp/engine.py", "from torchtitan_mtp import trainer"),
        ("data/spans.py", "def f():\n    from torchtitan_mtp.models.args import ModelArgs"),
        ("checkpoint/save.py", "from .. import formats"),
        ("trainer.py", "from .train import main"),
        ("__init__.py", "from torchtitan_mtp.ops import linear_cross_entropy"),
        ("mtp/engine.py", "import torchtitan_mtp.unheard_of"),
    ],
)
def test_a_wrong_import_is_found(file: str, source: str) -> None:
    assert len(violations(source, file)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("ops/loss.py", "import torch\nfrom torchtitan_mtp.errors import UserError"),
        ("mtp/engine.py", "from torchtitan_mtp.models import Transformer\nfrom . import families"),
        ("train.py", "from torchtitan_mtp import trainer\nfrom .config import parse_args"),
        ("formats/hf.py", "from torchtitan_mtp.checkpoint.files import write"),
    ],
)
def test_a_right_import_passes(file: str, source: str) -> None:
    assert violations(source, file) == []
