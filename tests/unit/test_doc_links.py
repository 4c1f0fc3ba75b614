"""Links of the documentation lead somewhere, and what it places in a file is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s:]*)(?:#([^)\s]*))?\)")  # not those of the web
CODE = re.compile(r"^```.*?^```|^ {4}.*?$|`[^`\n]+`", re.M | re.S)
PLACED = re.compile(r"`(\w+)` in \[[^]]+\]\(([^)]+\.py)\)")
API = re.compile(r"^\| \[`(\w+)`\]\(([^)]+\.py)\) \|", re.M)

# What a newcomer asks, and the heading or row that answers.
QUESTIONS = {
    "where is head k's loss": r"\| the loss of head k \| `\w+` in \[",
    "where are labels shifted": r"\| the shift of labels \| `make_batch` in \[",
    "how do I add a family": r"## A head family$",
    "how do I add a model": r"## A model$",
    "how do I add a source": r"## A data source$",
    "how do I add a format": r"## A file format$",
    "how do I add a key": r"\| a key of the configuration \| a field .*write_config_reference\.py",
    "where does FSDP wrap": r"\| FSDP2 wrapping \| `apply_fsdp` in \[",
    "where is the schedule": r"\| the schedule of forwards and backwards \| `head_by_head` in \[",
    "what does the engine do": r"## Two engines, one result$",
    "where is acceptance": r"\| acceptance of drafts \| `text_agreement` in \[",
    "what does TensorBoard log": r"## Tags$",
}


def links(page: Path) -> list[tuple[Path, str]]:
    """The files that a page links to, and the heading of each or ""."""
    found = LINK.finditer(CODE.sub("", page.read_text(encoding="utf-8")))
    return [((page.parent / m[1]).resolve() if m[1] else page, m[2] or "") for m in found]


def headings(page: Path) -> set[str]:
    """As links spell them, which GitHub and mkdocs.yml agree on."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in found}


def defines(file: Path, name: str) -> bool:
    code = file.read_text(encoding="utf-8")
    return re.search(rf"^ *(def|class) {name}\b|^{name}\b.*=", code, re.M) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for file, heading in links(page):
        assert file.exists(), file
        assert not heading or heading in headings(file), (file, heading)


def test_the_map_names_what_is_defined_there() -> None:
    """docs/architecture.md, "Where is": what people look for first."""
    page = ROOT / "docs/architecture.md"
    rows = re.findall(r"^\| .*` in \[.*$", page.read_text(encoding="utf-8"), re.M)
    placed = [pair for row in rows for pair in PLACED.findall(row)]
    assert len(rows) >= 15 and len(placed) > 20
    assert [pair for pair in placed if not defines(page.parent / pair[1], pair[0])] == []


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_is_answered_within_two_hops_of_the_readme(question: str) -> None:
    """The answer's page is one hop from README.md, and the code that a row names the second."""
    pages = [ROOT / "README.md"]
    pages += {file for file, _ in links(pages[0]) if file.suffix == ".md"}
    answer = re.compile(rf"^{QUESTIONS[question]}", re.M)
    assert [page for page in pages if answer.search(page.read_text(encoding="utf-8"))] != []


def test_the_public_names_are_those_of_the_packages() -> None:
    """docs/api.md: all names of a package, in the files that define them."""
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    assert len(sections) > 10
    for package, text in sections:
        module, names = importlib.import_module(package), dict(API.findall(text))
        assert names.keys() == set(getattr(module, "__all__", names)), package
        for name, file in names.items():
            assert hasattr(module, name) and defines(ROOT / "docs" / file, name), name


def test_the_changelog_is_ahead_of_its_last_version() -> None:
    """In the order of keepachangelog.com; what is not released is a development version."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first, *versions = re.findall(r"^## \[(.+?)\]( - \d{4}-\d\d-\d\d)?$", text, re.M)
    assert first == ("Unreleased", "") and all(date for _, date in versions)
    kinds = re.findall(r"^### (.+)$", text, re.M)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    version = importlib.import_module("torchtitan_mtp").__version__
    numbers = [tuple(map(int, v.split("."))) for v, _ in versions]
    assert version.endswith(".dev0") and numbers == sorted(numbers, reverse=True)
    assert tuple(map(int, version.removesuffix(".dev0").split("."))) > numbers[0]
