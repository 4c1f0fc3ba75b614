"""The page: its text, what is escaped, what stands in its titles."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from torchtitan_mtp.cli.show import HUES, Count, Shown, Span
from torchtitan_mtp.cli.show_html import page, write_page
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.inference.stats import Stats

SPANS = [
    Span("\n<script>alert('&amp;')</script>"),
    Span("é", (1, 2), 1),
    Span("b\n", (3,), 3),
    Span('"x\n', (2,), 4, True),
    Span("<b>", (1,), 4),
]
STATS = Stats(tokens=4, first_tokens=1, steps=2)
SHOWN = Shown([SPANS], [Count(1, 2, 0), Count(2, 1, 1), Count(3, 1, 0)], STATS)


class Page(HTMLParser):
    """Elements by name, and the text of <pre> with and without what is struck through."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.kept = self.struck = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "pre" in self.open:
            self.struck += data if "del" in self.open else ""
            self.kept += "" if "del" in self.open else data


def test_the_text_is_the_text() -> None:
    read = Page(page(SHOWN, "a <run>"))
    assert not read.open, "every element is closed"
    assert read.kept == "".join(span.text for span in SPANS if not span.rejected)
    assert read.struck == '"x↵'


def test_nothing_in_a_text_is_markup_and_nothing_is_fetched() -> None:
    text = page(SHOWN, "a <run>")
    read = Page(text)
    assert not {"script", "b", "run", "link", "img", "iframe"} & set(read.names)
    assert not {"src", "href", "onload", "action"} & {name for name, _ in read.attributes}
    assert "url(" not in text and "@import" not in text and "//" not in text


def test_titles_and_counts() -> None:
    text = page(SHOWN, "a <run>")
    assert "<title>1.50 tokens a step: a &lt;run&gt;</title>" in text
    assert "4 tokens, 1 by the prompt&#x27;s forward, 3 in 2 steps" in text
    titles = [value for name, value in Page(text).attributes if name == "title"]
    assert titles == [
        "tokens 1–2: head 1, head 2, draft of t+2, kept",
        "token 3: head 3, draft of t+3, kept",
        "token 4: head 2, draft of t+2, rejected",
        "token 4: head 1",
    ]
    rows = re.findall(r"<tr><th scope=\"row\">(.*?)</tr>", text)
    cells = [re.findall(r">([^<]+)<", row) for row in rows]
    assert cells == [
        ["head 1", "t+1", "2", "50%", "–"],
        ["head 2", "t+2", "1", "25%", "1"],
        ["head 3", "t+3", "1", "25%", "0"],
    ]
    for k in (2, 3):
        assert f".h{k} {{ --tint: {HUES[k - 2].tint}; " in text


def test_several_texts_have_headings() -> None:
    read = Page(page(SHOWN._replace(texts=[SPANS, SPANS]), "run"))
    assert read.names.count("pre") == read.names.count("h2") == 2


def test_the_file_is_whole_or_an_error(tmp_path: Path) -> None:
    write_page(SHOWN, "run", tmp_path / "a.html")
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == page(SHOWN, "run")
    with pytest.raises(UserError, match=r"--html .*none/a.html: can't be written"):
        write_page(SHOWN, "run", tmp_path / "none" / "a.html")
