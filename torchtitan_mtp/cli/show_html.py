"""A page of HTML that shows which head drafted what: one file, without scripts or other files."""

from __future__ import annotations

from html import escape
from pathlib import Path

from torchtitan_mtp.cli.show import PROMPT, Shown, Span, figures, headline, hue, visible
from torchtitan_mtp.errors import writing
from torchtitan_mtp.writing import written_whole


def write_page(shown: Shown, source: str, file: Path) -> None:
    """Write `page`. Error: the file can't be written."""
    with writing(f"--html {file}"), written_whole(file) as aside:
        aside.write_text(page(shown, source), encoding="utf-8", errors="replace")


def page(shown: Shown, source: str) -> str:
    """The page. source: what its texts are of, the checkpoint's name."""
    title = headline(shown.stats)
    texts = "\n".join(section(shown, i) for i in range(len(shown.texts)))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}: {escape(source)}</title>
<style>
{_STYLE}{colors(shown)}</style>
</head>
<body>
<main>
<header>
<h1>{escape(title)}</h1>
<p>{escape(source)}: {escape(figures(shown.stats))}.</p>
</header>
{legend(shown)}
{texts}
</main>
</body>
</html>
"""


def legend(shown: Shown) -> str:
    """The heads' shares as a bar, their counts as a table, and the two switches."""
    bar, rows = "", ""
    for head, tokens, struck in shown.counts:
        share = f"{tokens / max(shown.stats.tokens, 1):.0%}"
        bar += f'<i class="token h{head}" style="flex:{tokens}"></i>' if tokens else ""
        swatch = f'<span class="token h{head}">head {head}</span>'
        rejected = f'<del class="token h{head}">{struck}</del>'
        rows += (
            f'<tr><th scope="row">{swatch}</th><td>t+{head}</td><td>{tokens}</td>'
            f"<td>{share}</td><td>{rejected if head > 1 else '–'}</td></tr>\n"
        )
    return f"""<div class="bar" aria-hidden="true">{bar}</div>
<div class="legend">
<table>
<thead><tr><th scope="col">said by</th><th scope="col">predicts</th><th scope="col">tokens</th>
<th scope="col">share</th><th scope="col">rejected drafts</th></tr></thead>
<tbody>
{rows}</tbody>
</table>
<form>
<label><input type="checkbox" id="rejected" checked> rejected drafts, before what is in their
place</label>
<label><input type="checkbox" id="numbers"> the head's number behind each draft</label>
</form>
</div>"""


def section(shown: Shown, index: int) -> str:
    """One text."""
    count, spans = len(shown.texts), "".join(map(element, shown.texts[index]))
    heading = f"<h2>{index + 1} of {count}</h2>\n" if count > 1 else ""
    return f'<section>\n{heading}<pre translate="no">{spans}</pre>\n</section>'


def element(span: Span) -> str:
    """A span: <del> where it was rejected. The mark of a line's end in a draft that stands is the
    style's, so that the text that is copied is the text."""
    text = escape(visible(span)).replace("↵\n", "<i></i>\n")
    if span.head == PROMPT:
        return f'<span class="prompt">{text}</span>'
    tag, classes, number = ("del" if span.rejected else "span"), f"h{span.head}", ""
    if span.drafted:
        classes, number = f"token {classes}", f' data-head="{span.head}"'
    return f'<{tag} class="{classes}"{number} title="{description(span)}">{text}</{tag}>'


def description(span: Span) -> str:
    """What is told of a span where the mouse is over it."""
    last = span.place + len(span.heads) - 1
    place = f"token {last}" if last == span.place else f"tokens {span.place}–{last}"
    names = ", ".join(f"head {head}" for head in span.heads)
    if not span.drafted:
        return f"{place}: {names}"
    return f"{place}: {names}, draft of t+{span.head}, {'rejected' if span.rejected else 'kept'}"


def colors(shown: Shown) -> str:
    """The heads' colours, which the style below puts on light and on dark ground."""
    heads = ((count.head, hue(count.head)) for count in shown.counts[1:])
    return "".join(
        f".h{head} {{ --tint: {of.tint}; --middle: {of.middle}; --shade: {of.shade}; }}\n"
        for head, of in heads
    )


# Text has a contrast of 4.5 or more with what is behind it (WCAG 2.2, 1.4.3), and a head's number
# can be had beside its colour (1.4.1).
_STYLE = """\
:root { color-scheme: light dark; --ground: #ffffff; --text: #1b1f24; --quiet: #5b6470;
  --line: #d8dde3; --panel: #ffffff; --one: #c9ced6; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #16181d; --text: #e8eaed; --quiet: #a2abb8; --line: #363b44;
    --panel: #1e2127; --one: #565d69; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.5rem 3rem; }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2; }
h2 { margin: 2rem 0 .5rem; font-size: 1rem; }
header p { margin: .25rem 0 1.25rem; color: var(--quiet); overflow-wrap: anywhere; }
.bar { display: flex; gap: 2px; height: .75rem; border-radius: 4px; overflow: hidden; }
.legend { display: flex; flex-wrap: wrap; gap: .75rem 3rem; align-items: flex-end;
  margin: .75rem 0 1.25rem; font-size: .875rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem 1.25rem .15rem 0; text-align: right; font-weight: normal; }
th:first-child { text-align: left; }
thead th { color: var(--quiet); }
label { display: block; padding: .15rem 0; }
pre { margin: 0; padding: 1rem 1.25rem; border: 1px solid var(--line); border-radius: 8px;
  background: var(--panel); font: .9375rem/1.75 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono",
  monospace; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 8; }
.prompt { font-weight: 700; }
.token { border-radius: 3px; padding: .1em 0; background: var(--tint); color: #000000; }
.token i::before { content: "↵"; font-style: normal; }
th .token { padding: .1em .5em; }
th .h1 { background: none; color: inherit; }
.bar .h1 { background: var(--one); }
pre del { font-size: .8em; }
del.token { background: none; color: var(--middle); }
@media (prefers-color-scheme: dark) {
  .token { background: var(--shade); color: #ffffff; }
  del.token { background: none; color: var(--tint); } }
body:has(#rejected:not(:checked)) pre del { display: none; }
body:has(#numbers:checked) pre .token::after { content: attr(data-head); font-size: .65em;
  vertical-align: super; line-height: 1; }
@media (forced-colors: active) { .token { forced-color-adjust: none; } }
@media print { * { print-color-adjust: exact; } form { display: none; } }
"""
