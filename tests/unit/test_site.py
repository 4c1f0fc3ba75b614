"""scripts/site_pages.py: the repository's links as the site has them. `mkdocs build --strict` does
the rest (.ci/run)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from site_pages import for_site, repository_path, site_path, source_page, with_docstrings

ROOT = Path(__file__).resolve().parents[2]

# Where a link stands, the link, and what becomes of it.
LINKS = [
    ("README.md", "[a](docs/mtp.md#two-engines)", "[a](mtp.md#two-engines)"),
    ("README.md", "![a](docs/images/quickstart.png)", "![a](images/quickstart.png)"),
    ("README.md", "[a](LICENSE)", "[a](source/LICENSE.md)"),
    ("docs/mtp.md", "[a](serving.md), [b](#top)", "[a](serving.md), [b](#top)"),
    ("docs/mtp.md", "[a](../README.md)", "[a](index.md)"),
    ("docs/mtp.md", "[a](../CONTRIBUTING.md)", "[a](CONTRIBUTING.md)"),
    (
        "docs/mtp.md",
        "[a](../torchtitan_mtp/mtp/engine.py)",
        "[a](source/torchtitan_mtp/mtp/engine.py.md)",
    ),
    ("docs/mtp.md", "[gone](../gone.py)", "[gone](../gone.py)"),  # for mkdocs to warn of
    ("docs/mtp.md", "`f[0](serving.md)`", "`f[0](serving.md)`"),
    ("docs/mtp.md", "```bash run\n[a](../LICENSE)\n```\n", "```bash\n[a](../LICENSE)\n```\n"),
    ("docs/mtp.md", "[a](https://x.org/b.md)", "[a](https://x.org/b.md)"),
]


@pytest.mark.parametrize(("page", "text", "expected"), LINKS)
def test_links_are_those_of_the_site(page: str, text: str, expected: str) -> None:
    assert for_site(text, page) == expected


def test_a_page_is_found_by_its_file_and_back() -> None:
    for path in ("README.md", "CHANGELOG.md", "docs/mtp.md"):
        assert repository_path(site_path(path)) == path


def test_a_table_of_names_is_followed_by_their_docstrings() -> None:
    text = "# A\n\n## p\n\n| name | |\n|---|---|\n| [`f`](../p/m.py) | x |\n\n## q\n"
    assert with_docstrings(text) == (
        "# A\n\n\n## p\n\n| name | |\n|---|---|\n| [`f`][p.m.f] | x |\n\n\n::: p.m.f\n\n## q\n\n"
    )


def test_a_source_file_is_shown_whole() -> None:
    page = source_page("scripts/site_pages.py")
    assert (ROOT / "scripts/site_pages.py").read_text(encoding="utf-8") in page
    assert page.startswith("---\ntitle: scripts/site_pages.py\n")


def test_every_page_of_the_documentation_has_its_place() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    pages = re.findall(r"(\S+\.md)$", nav, re.M)
    names = [path.name for path in (ROOT / "docs").glob("*.md")]
    assert sorted(pages) == sorted([*names, "index.md", "CONTRIBUTING.md", "CHANGELOG.md"])
