"""Hooks of mkdocs.yml: the Markdown of this repository, read as the pages of a site.

Links in the documentation are paths of files, so that they work where the files are read. On the
site README.md is the first page, CONTRIBUTING.md and CHANGELOG.md are beside those of docs/, a
source file is a page if one links to it, and a table of docs/api.md is followed by the docstrings
of its names. A link to a file that is not there stays as it is, and mkdocs warns of it; this warns
of a page that mkdocs shows otherwise than what reads CommonMark, such as GitHub. With `--strict`
warnings fail.
"""

from __future__ import annotations

import logging
import posixpath
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
API = "api.md"
CODE_OR_LINK = re.compile(
    r"^(?P<fence>`{3,}).*?^(?P=fence)|^ {4}.*?$|`[^`\n]+`|\]\((?P<target>[^)#\s:]+)", re.M | re.S
)
ENTRY = re.compile(r"^\| \[`(\w+)`\]\(\.\./([^)]+)\.py\)", re.M)  # a row of docs/api.md
log = logging.getLogger("mkdocs.hooks.site_pages")


def site_path(path: str) -> str:
    """Where a file of the repository is on the site."""
    if path in PAGES or path.startswith("docs/"):
        return PAGES.get(path, path.removeprefix("docs/"))
    return f"source/{path}.md"


def repository_path(page: str) -> str:
    """The file of the repository that a page of the site is made from."""
    return {site: path for path, site in PAGES.items()}.get(page, f"docs/{page}")


def links(text: str, path: str) -> dict[str, str]:
    """The files that the Markdown file `path` with this text links to, by how it spells them."""
    spelled = [match["target"] for match in CODE_OR_LINK.finditer(text) if match["target"]]
    found = {s: posixpath.normpath(posixpath.join(posixpath.dirname(path), s)) for s in spelled}
    return {s: file for s, file in found.items() if (ROOT / file).is_file()}


def for_site(text: str, path: str) -> str:
    """The text of the Markdown file `path` with its links as the site has them."""
    targets = links(text, path)
    here = posixpath.dirname(site_path(path))

    def move(match: re.Match[str]) -> str:
        if match["target"] not in targets:
            return match[0]
        return "](" + posixpath.relpath(site_path(targets[match["target"]]), here)

    text = CODE_OR_LINK.sub(move, text)
    return re.sub(r"^```bash run$", "```bash", text, flags=re.M)  # scripts/check_readme.py's mark


def with_docstrings(text: str) -> str:
    """docs/api.md with the names of a section's table as links, and their docstrings after it."""
    sections = re.split(r"^(?=## )", text, flags=re.M)
    for i, section in enumerate(sections):
        names = [f"{file.replace('/', '.')}.{name}" for name, file in ENTRY.findall(section)]
        section = ENTRY.sub(lambda m: f"| [`{m[1]}`][{m[2].replace('/', '.')}.{m[1]}]", section)
        sections[i] = section + "".join(f"\n::: {name}\n" for name in names) + "\n"
    return "".join(sections)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in docs/, and the source files that any page links to."""
    from mkdocs.structure.files import File

    for path, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text("utf-8")))
    linked: set[str] = set()
    for file in files.documentation_pages():
        linked.update(links(file.content_string, repository_path(file.src_uri)).values())
    for path in sorted(linked):
        page = site_path(path)
        if page.startswith("source/"):
            files.append(File.generated(config, page, content=source_page(path)))
    return files


def source_page(path: str) -> str:
    """A source file as a page of its own, which the search leaves out."""
    kind = {".py": "python", ".toml": "toml"}.get(Path(path).suffix, "text")
    text = (ROOT / path).read_text("utf-8")
    head = f"---\ntitle: {path}\nsearch: {{exclude: true}}\n---\n# {path}\n\n"
    return f'{head}~~~~~~ {{ .{kind} linenums="1" }}\n{text}\n~~~~~~\n'


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    if page.file.src_uri.startswith("source/"):
        return markdown
    if page.file.src_uri == API:
        markdown = with_docstrings(markdown)
    return for_site(markdown, repository_path(page.file.src_uri))


def on_page_content(html: str, page: Page, **_: Any) -> None:
    """Warn where mkdocs' Markdown and CommonMark see other lists, tables, blocks or emphasis, and
    where a docstring's argument stands outside of `Args:` and would be folded away."""
    from markdown_it import MarkdownIt

    if page.file.src_uri == API:
        for name in re.findall(r'<details class="(?!mkdocstrings-source)([^"]+)', html):
            log.warning(f"docs/{API}: the docstring with {name!r} has it outside of Args:")
    if page.file.src_uri.startswith("source/") or page.file.src_uri == API:
        return
    common = MarkdownIt("commonmark").enable("table").render(page.file.content_string)
    here, there = elements(html), elements(common)
    for tag in sorted(here.keys() | there.keys()):
        if here[tag] != there[tag]:
            path = repository_path(page.file.src_uri)
            log.warning(f"{path}: {here[tag]} <{tag}> on the site, {there[tag]} in CommonMark")


def elements(html: str) -> Counter[str]:
    return Counter(
        re.findall(r"<(h[1-6]|li|ol|ul|p|table|tr|td|th|pre|code|em|strong|img)\b", html)
    )
