"""Who said which token, and how it looks in a terminal: on rows and spans made by hand."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from small_tokenizers import sentencepiece
from torchtitan_mtp.cli.show import (
    HUES,
    PROMPT,
    Count,
    Shown,
    Span,
    authors,
    count_heads,
    has_colors,
    marked,
    print_shown,
    spans_of,
)
from torchtitan_mtp.data.tokenizer import ByteTokenizer, HFTokenizer
from torchtitan_mtp.inference.rows import Generation, Rows, Step
from torchtitan_mtp.inference.stats import Stats

BYTES = ByteTokenizer()


def ids(text: str) -> list[int]:
    return list(text.encode())


# "a" is of the prompt's forward; then heads 2 and 3 are right and 4 is not; then none is.
TOKENS = ids("abcdef")
STEPS = [Step(1, ids("bcX"), 2), Step(4, ids("YZ"), 0), Step(5, ids("f!!"), 1)]


def test_who_said_each_token() -> None:
    assert authors(TOKENS, STEPS) == [1, 2, 3, 1, 1, 2]
    assert authors(ids("abc"), [Step(1, ids("bcde"), 4)]) == [1, 2, 3]  # the row ended before
    assert authors([7], []) == [1]


def test_spans_by_hand() -> None:
    """Rejected drafts stand before what head 1 said; those beyond the end are nobody's."""
    assert spans_of(BYTES, ids("p"), TOKENS, STEPS) == [
        Span("a", (1,), 1),
        Span("b", (2,), 2),
        Span("c", (3,), 3),
        Span("X", (4,), 4, True),
        Span("d", (1,), 4),
        Span("Y", (2,), 5, True),
        Span("Z", (3,), 6, True),
        Span("e", (1,), 5),
        Span("f", (2,), 6),
    ]


def test_a_stop_string_ends_the_spans() -> None:
    assert [s.text for s in spans_of(BYTES, [], TOKENS, STEPS, 4)] == ["a", "b", "c", "X", "d"]
    assert spans_of(BYTES, [], TOKENS, STEPS, 0) == []


def test_a_character_of_several_tokens() -> None:
    """It is there when its last byte is, and has that one's colour; a rejected draft is decoded
    after the bytes before it, and what is no character is U+FFFD."""
    tokens, first = ids("x€é"), "€".encode()
    steps = [Step(1, [first[0], first[1], 0x80], 2), Step(4, [0xC3, 0xA8], 1)]
    assert spans_of(BYTES, [], tokens, steps) == [
        Span("x", (1,), 1),
        Span("\u2080", (4,), 4, True),  # E2 82 80, instead of AC
        Span("€", (2, 3, 1), 2),
        Span("è", (3,), 6, True),
        Span("é", (2, 1), 5),
    ]
    assert spans_of(BYTES, [], [0xE2, 0x82], [Step(1, [0x82], 1)]) == [Span("\ufffd", (1, 2), 1)]
    half = spans_of(BYTES, [], list(first), [Step(1, [0x83], 0)])  # E2 83, of which more is to come
    assert half == [Span("\ufffd", (2,), 2, True), Span("€", (1, 1, 1), 1)]
    # Bytes of the text that no character has are not the draft's: A, or a part of a character.
    for draft, text in ((0x41, "A"), (0xC3, "\ufffd")):
        spans = spans_of(BYTES, [], [0xFF, 0xFF, 0x42], [Step(2, [draft], 0)])
        assert spans == [Span(text, (2,), 3, True), Span("\ufffd\ufffdB", (1, 1, 1), 1)]


def test_words_keep_the_space_before_them(tmp_path: Path) -> None:
    """SentencePiece drops it at the beginning of a text, which a draft is not."""
    sentencepiece("<unk>", "<s>", "</s>", front="<s>").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    tokenizer = HFTokenizer(tmp_path / "tokenizer.json")
    the, cat = tokenizer.encode("the")[0], tokenizer.encode("cat").tolist()
    spans = spans_of(tokenizer, [1, the], [the, *cat], [Step(1, [the, 2], 0)])
    assert "".join(s.text for s in spans if not s.rejected) == " the cat"
    # A special token stands for no text; a rejected one is called by its name.
    assert [s.text for s in spans if s.rejected] == [" the", "</s>"]


def test_counts_are_those_of_the_statistics() -> None:
    rows = Rows(2, 6, 9, 2)
    rows.start([[1], [5]])
    rows.accept([[1, 2, 3], [5, 0, 7]], [[2, 3, 4], [6, 8, 8]])
    rows.accept([[4, 5, 0], [6, 9, 1]], [[5, 6, 7], [9, 9, 9]])  # row 1 ends with its draft, 9
    generation = rows.finish(0, 1)
    counts = count_heads(generation)
    assert generation.tokens == [[1, 2, 3, 4, 5, 6], [5, 6, 9]]
    # Row 0: 2, 3 and 5 were drafted, 0 was not to be. Row 1: 0 and 7 were not; 9 was the end.
    assert counts == [Count(1, 5, 0), Count(2, 3, 1), Count(3, 1, 2)]
    assert [c.tokens for c in counts[1:]] == generation.stats.right
    assert sum(c.tokens for c in counts) == generation.stats.tokens


SPANS = [
    Span("def "),
    Span("a", (1,), 1),
    Span("b\n", (2,), 2),
    Span("x\n", (3,), 3, True),
    Span("[/b]", (4,), 4, True),
    Span("\x1b", (1,), 3),
    Span("d", (12,), 4),
]
SHOWN = Shown([SPANS], [Count(1, 2, 0), Count(2, 1, 0), Count(3, 0, 1)], Stats(tokens=4, steps=2))


def printed(monkeypatch: pytest.MonkeyPatch, shown: Shown = SHOWN, **console: bool) -> str:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    out = Console(file=io.StringIO(), width=20, **console)  # type: ignore[arg-type]
    print_shown(shown, out)
    return out.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_without_a_terminal_marks_stand_for_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "def ab↵²\n[-x↵³[/b]⁴-]␛d¹²"
    assert marked(SPANS) == text
    lines = printed(monkeypatch)
    assert lines.startswith(
        f"{text}\nhead 1: 2 tokens   head 2 (x²): 1, 0 rejected   head 3 (x³): "
    )
    assert lines.endswith("2.00 tokens a step: 4 tokens, 0 by the prompt's forward, 4 in 2 steps\n")
    monkeypatch.setenv("NO_COLOR", "1")
    assert printed(monkeypatch, force_terminal=True) == lines


def sgr(color: str, ground: int) -> str:
    """What a terminal is told for a colour (ECMA-48 and ISO 8613-6): 38 text, 48 ground."""
    return f"{ground};2;" + ";".join(str(int(color[i : i + 2], 16)) for i in (1, 3, 5))


def test_in_a_terminal_heads_have_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = printed(monkeypatch, force_terminal=True)
    black, tint = sgr("#000000", 38), sgr(HUES[0].tint, 48)
    assert out.startswith(f"\x1b[1mdef \x1b[0ma\x1b[{black};{tint}mb↵\x1b[0m\n")
    assert f"\x1b[9;{sgr(HUES[1].middle, 38)}mx↵\x1b[0m" in out  # 9: struck through
    assert f"\x1b[{black};{sgr(HUES[10 % len(HUES)].tint, 48)}md\x1b[0m" in out
    assert "\x1b[0m␛" in out and "[/b]" in out
    assert f"\x1b[{black};{tint}mhead 2\x1b[0m: 1, " in out


def test_several_texts_are_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    out = printed(monkeypatch, SHOWN._replace(texts=[SPANS[:1], SPANS[:2]]))
    assert out.startswith("--- 1 of 2\ndef \n--- 2 of 2\ndef a\nhead 1")


def test_sixteen_colours_are_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("COLORTERM", raising=False)
    for term, enough in {"xterm": False, "dumb": False, "xterm-256color": True}.items():
        monkeypatch.setenv("TERM", term)
        assert has_colors(Console(force_terminal=True)) is enough


def test_one_token_has_no_steps() -> None:
    generation = Generation([[ids("a")[0]]], Stats(tokens=1, first_tokens=1), [[]])
    assert count_heads(generation) == [Count(1, 1, 0)]
    assert Span("a").heads == (PROMPT,)


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio of two colours."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("hue", HUES)
def test_colours_can_be_read(hue: tuple[str, str, str]) -> None:
    tint, middle, shade = hue
    assert contrast("#000000", "#ffffff") == 21
    assert contrast(tint, "#000000") > 7 and contrast(shade, "#ffffff") > 7
    assert contrast(middle, "#ffffff") > 4.5 and contrast(middle, "#000000") > 4.5
    assert contrast(tint, "#1e2127") > 7  # rejected drafts on the page's dark ground
