"""Links of the documentation lead somewhere, and what it places in a file is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s:]+)(#[^)\s]*)?\)")  # not those of the web
CODE = re.compile(r"^```.*?^```|^ {4}.*?$|`[^`\n]+`", re.M | re.S)
PLACED = re.compile(r"`(\w+)` in \[[^]]+\]\(([^)]+\.py)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = [match[1] for match in LINK.finditer(CODE.sub("", page.read_text("utf-8")))]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_map_names_what_is_defined_there() -> None:
    """docs/architecture.md, "Where is": what people look for first."""
    page = ROOT / "docs/architecture.md"
    rows = re.findall(r"^\| .*` in \[.*$", page.read_text(encoding="utf-8"), re.M)
    placed = [pair for row in rows for pair in PLACED.findall(row)]
    assert len(rows) == 15 and len(placed) > 12
    for name, target in placed:
        code = (page.parent / target).read_text(encoding="utf-8")
        assert re.search(rf"^ *(def|class) {name}\b|^{name}\b.*=", code, re.M), (name, target)
