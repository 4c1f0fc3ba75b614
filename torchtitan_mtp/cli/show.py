"""Which head drafted each token of a text, and what was rejected: as spans, and in a terminal.

The spans are what the terminal and the page (`show_html.py`) have in common. A token of head 1 is
plain, one that head k drafted has head k's colour, and drafts that head 1 rejected stand struck
through before what it said instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.style import Style
from rich.text import Text

from torchtitan_mtp.data.tokenizer import Tokenizer
from torchtitan_mtp.inference.rows import Generation, Step
from torchtitan_mtp.inference.stats import Stats
from torchtitan_mtp.inference.text_stream import TextStream

PROMPT = 0  # the head of what no head said
# A rejected draft is decoded after so many tokens: enough for a character's bytes and for the space
# that SentencePiece drops at the beginning of a text.
_BEFORE = 16
# What a terminal would obey becomes a picture of it.
_PICTURES = {c: 0x2400 + c for c in range(32) if chr(c) not in "\t\n"} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


class Hue(NamedTuple):
    """One head's colour: `tint` lies behind black text, `shade` behind white text, and `middle` is
    for text itself: on white and on black it has a contrast of 4.5."""

    tint: str
    middle: str
    shade: str


HUES = (
    Hue("#b9d7fe", "#1d75d7", "#264b7a"),  # blue
    Hue("#f7cc96", "#a26906", "#674103"),  # amber
    Hue("#ade5b7", "#01873d", "#1e582f"),  # green
    Hue("#febfdc", "#c2488a", "#6e3451"),  # pink
    Hue("#dbcafe", "#8b5dce", "#523e74"),  # violet
    Hue("#8ee6ea", "#0a8287", "#055559"),  # teal
    Hue("#ffc4bb", "#cc483d", "#73352e"),  # red
)


def hue(head: int) -> Hue:
    """Of a drafting head, 2, 3, ...; beyond head 8 they begin again."""
    return HUES[(head - 2) % len(HUES)]


class Span(NamedTuple):
    """A piece of text.

    heads: who said its tokens, in their order: several where a character's bytes are several
    tokens. place: of the first of them among the new tokens, from 1. rejected: it is a draft that
    is not in the text.
    """

    text: str
    heads: tuple[int, ...] = (PROMPT,)
    place: int = 0
    rejected: bool = False

    @property
    def head(self) -> int:
        """Whose colour it has: who completed it."""
        return self.heads[-1]

    @property
    def drafted(self) -> bool:
        """By one of heads 2..n, accepted or not."""
        return self.head > 1


class Count(NamedTuple):
    """Of one head: how many tokens of the texts are its own, and how many of its drafts were
    rejected."""

    head: int
    tokens: int
    rejected: int


class Shown(NamedTuple):
    """What is to be seen of a generation: each row's spans, the prompt's first if it is shown."""

    texts: list[list[Span]]
    counts: list[Count]
    stats: Stats


def show(
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    generation: Generation,
    asked: Sequence[str],
    sizes: Sequence[int | None],
) -> Shown:
    """What is to be seen of each row: `asked`, its prompt's text, and `spans_of` it."""
    texts = []
    for row, (text, prompt) in enumerate(zip(asked, prompts, strict=True)):
        tokens, steps = generation.tokens[row], generation.steps[row]
        spans = spans_of(tokenizer, prompt, tokens, steps, sizes[row])
        texts.append([Span(text), *spans] if text else spans)
    return Shown(texts, count_heads(generation), generation.stats)


def authors(tokens: Sequence[int], steps: Sequence[Step]) -> list[int]:
    """The head that said each token of a row: 1, or the one that drafted it."""
    heads = [1] * len(tokens)
    for place, _, accepted in steps:
        stop = min(place + accepted, len(tokens))
        heads[place:stop] = range(2, 2 + stop - place)
    return heads


def rejected(tokens: Sequence[int], steps: Sequence[Step]) -> dict[int, tuple[int, list[int]]]:
    """Where drafts of a row were rejected: the first of their heads, and they themselves. Those
    beyond the end of the text were never answered."""
    places = ((step.place + step.accepted, step) for step in steps)
    return {
        place: (2 + step.accepted, drafts)
        for place, step in places
        if place < len(tokens) and (drafts := step.drafts[step.accepted :])
    }


def count_heads(generation: Generation) -> list[Count]:
    """Of head 1 and each that drafted, over all rows."""
    num_heads = 1 + len(generation.stats.checked)
    said, struck = [0] * num_heads, [0] * num_heads
    for tokens, steps in zip(generation.tokens, generation.steps, strict=True):
        for head in authors(tokens, steps):
            said[head - 1] += 1
        for first, drafts in rejected(tokens, steps).values():
            for head in range(first, first + len(drafts)):
                struck[head - 1] += 1
    return list(map(Count, range(1, num_heads + 1), said, struck))


def spans_of(
    tokenizer: Tokenizer,
    prompt: list[int],
    tokens: list[int],
    steps: Sequence[Step],
    size: int | None = None,
) -> list[Span]:
    """What a row's new tokens add to its prompt, with the drafts that were rejected on the way;
    up to `size` characters where a stop string ended the text, be it within a token."""
    heads, struck = authors(tokens, steps), rejected(tokens, steps)
    stream, spans, told, first = TextStream(tokenizer, (), prompt), list[Span](), 0, 0
    for place, token in enumerate(tokens):
        if told == size:
            return spans
        if place in struck:
            before = (prompt + tokens[:place])[-_BEFORE:]
            spans += struck_spans(tokenizer, before, place + 1, *struck[place])
        stream.add(token)
        if text := stream.text[told:size]:
            spans.append(Span(text, tuple(heads[first : place + 1]), first + 1))
            told, first = told + len(text), place + 1
    if text := stream.finish()[told:size]:  # bytes at the end that are no character
        spans.append(Span(text, tuple(heads[first:]), first + 1))
    return spans


def struck_spans(
    tokenizer: Tokenizer, before: list[int], place: int, head: int, drafts: list[int]
) -> Iterator[Span]:
    """Rejected drafts of heads `head`, `head` + 1, ... after the tokens `before` them, which are to
    have been the new ones from `place` on."""
    names = {token: name for name, token in getattr(tokenizer, "specials", {}).items()}
    stream, told, first = TextStream(tokenizer, (), before), 0, 0
    for j, draft in enumerate(drafts, start=1):
        stream.add(draft)
        ends = j == len(drafts)
        text = (stream.finish() if ends else stream.text)[told:]
        told += len(text)
        text = text or names.get(draft, "")  # a special token stands for no text
        if text or ends:
            text = text or tokenizer.decode(drafts[first:])  # bytes that go on with a character
            yield Span(text, tuple(range(head + first, head + j)), place + first, True)
            first = j


def visible(span: Span) -> str:
    """Its text with pictures of control characters. Of a draft also the end of a line is to be
    seen, which one that was rejected does not end."""
    text = span.text.translate(_PICTURES)
    if span.rejected:
        return text.replace("\n", "↵").replace("\t", "⇥")
    return text.replace("\n", "↵\n") if span.drafted else text


def has_colors(console: Console) -> bool:
    """Whether the spans' colours can be told apart: on a terminal of 256 colours or more, unless
    the environment has NO_COLOR."""
    return console.color_system in ("256", "truecolor") and not console.no_color


def style(head: int, rejected: bool = False) -> Style:
    """Bold for the prompt, none for head 1; of drafts the head's colour, struck out if rejected."""
    if head <= 1:
        return Style(bold=head == PROMPT)
    if rejected:
        return Style(color=hue(head).middle, strike=True)
    return Style(color="#000000", bgcolor=hue(head).tint)


def colored(spans: Sequence[Span]) -> Text:
    """The spans for a terminal."""
    return Text.assemble(*((visible(span), style(span.head, span.rejected)) for span in spans))


def marked(spans: Sequence[Span]) -> str:
    """The spans without colours: the head's number behind each draft, [-those rejected-]."""

    def mark(span: Span) -> str:
        if not span.drafted:
            return visible(span)
        text = (whole := visible(span)).rstrip("\n")  # the mark is on the draft's own line
        return text + superscript(span.head) + whole[len(text) :]

    parts = itertools.groupby(spans, lambda span: span.rejected)
    texts = ((struck, "".join(map(mark, group))) for struck, group in parts)
    return "".join(f"[-{text}-]" if struck else text for struck, text in texts)


def superscript(number: int) -> str:
    """The number in small raised digits."""
    return str(number).translate(_SUPERSCRIPTS)


def headline(stats: Stats) -> str:
    """What a step yielded, where there was one after the prompt's forward."""
    return f"{stats.tokens_per_step:.2f} tokens a step" if stats.steps else f"{stats.tokens} tokens"


def figures(stats: Stats) -> str:
    """What `headline` follows from."""
    later = stats.tokens - stats.first_tokens
    first = f"{stats.first_tokens} by the prompt's forward"
    return f"{stats.tokens} tokens, {first}, {later} in {stats.steps} steps"


def legend(shown: Shown, colors: bool) -> Text:
    """What colours or marks mean, each head's counts, and `figures`."""
    parts = [Text(f"head 1: {shown.counts[0].tokens} tokens")]
    for head, tokens, struck in shown.counts[1:]:
        name = f"head {head}" if colors else f"head {head} (x{superscript(head)})"
        part = Text.assemble((name, style(head) if colors else ""), f": {tokens}, ")
        rejected_style = style(head, True) if colors else ""
        parts.append(part.append(f"{struck} rejected", rejected_style))
    lines = [Text("   ").join(parts), Text(f"{headline(shown.stats)}: {figures(shown.stats)}")]
    if not colors:
        lines.insert(1, Text("x² is a draft of head 2, [-x²-] one that head 1 rejected"))
    return Text("\n").join(lines)


def print_shown(shown: Shown, console: Console) -> None:
    """The texts and the legend."""
    colors = has_colors(console)
    for i, spans in enumerate(shown.texts, start=1):
        if len(shown.texts) > 1:
            console.print(f"--- {i} of {len(shown.texts)}", highlight=False)
        if colors:
            console.print(colored(spans), soft_wrap=True)
        else:
            print(marked(spans), file=console.file)
    console.print(legend(shown, colors), soft_wrap=True)
