"""What an experiment ends with: its JSON file, its tables, its picture."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import markdown, write_json

from experiments.design import Claim, Experiment, Factors, Figure, Panel, Row
from experiments.intervals import Interval, bootstrap
from torchtitan_mtp.cli.figures import new_figure, save_figure
from torchtitan_mtp.errors import UserError

REPRODUCED = {1: "reproduced", 0: "open", -1: "the opposite"}  # claims of a paper
ANSWERED = {1: "yes", 0: "open", -1: "no"}  # questions of this project


def has(row: Mapping[str, Any], factors: Factors) -> bool:
    return all(row.get(key) == value for key, value in factors.items())


def values_of(rows: Sequence[Row], factors: Factors, figure: str) -> dict[int, float]:
    """A variant's figure by seed; empty where it was not run or has no such figure."""
    return {row["seed"]: row[figure] for row in rows if has(row, factors) and figure in row}


def variants(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """The factors of all variants, in the order of the rows."""
    found = [{key: row[key] for key in names if key in row} for row in rows]
    return [v for i, v in enumerate(found) if v not in found[:i]]


def factor_names(rows: Sequence[Row]) -> list[str]:
    """What stands before the seed."""
    return list(dict.fromkeys(key for row in rows for key in list(row)[: list(row).index("seed")]))


def cell(values: Mapping[int, float], figure: Figure) -> str:
    """The mean over seeds, and its interval where it is asked for and they differ."""
    if not values:
        return ""
    numbers = list(values.values())
    if not figure.interval or len(set(numbers)) == 1:
        return figure.text(sum(numbers) / len(numbers))
    mean, low, high = bootstrap(numbers)
    return f"{figure.text(mean)} [{figure.text(low)}, {figure.text(high)}]"


def figures_table(experiment: Experiment, rows: Sequence[Row]) -> str:
    """A line a variant."""
    lines = []
    for variant in variants(rows, factor_names(rows)):
        cells = {f.title: cell(values_of(rows, variant, f.key), f) for f in experiment.figures}
        lines.append(variant | cells)
    return markdown(lines)


def difference(claim: Claim, rows: Sequence[Row]) -> Interval | None:
    """Of the two variants, seed by seed; None where one of them was not run."""
    ours = values_of(rows, claim.of, claim.figure)
    if isinstance(claim.than, Mapping):
        theirs = values_of(rows, claim.than, claim.figure)
    else:
        theirs = dict.fromkeys(ours, float(claim.than))
    seeds = sorted(set(ours) & set(theirs))
    return bootstrap([ours[s] - theirs[s] for s in seeds]) if len(seeds) > 1 else None


def verdict(claim: Claim, found: Interval) -> str:
    """Reproduced, or yes, only where zero is outside of the difference's interval, on the side that
    the claim has it on."""
    return (REPRODUCED if claim.source else ANSWERED)[claim.sign * found.verdict]


def claims_table(experiment: Experiment, rows: Sequence[Row]) -> str:
    """A line a claim: the difference of its two variants, and whether it excludes zero."""
    figures, lines = {f.key: f for f in experiment.figures}, []
    for claim in experiment.claims:
        found = difference(claim, rows)
        if found is not None:
            figure = figures[claim.figure]
            ends = ", ".join(figure.text(end, "+") for end in found[1:])
            told = f"{figure.text(found.mean, '+')} [{ends}]"
            lines.append(
                {
                    "claim": claim.says,
                    "of": claim.source or "ours",
                    "figure": figure.title,
                    "difference": told,
                    "": verdict(claim, found),
                }
            )
    return markdown(lines)


def tables(experiment: Experiment, rows: Sequence[Row]) -> str:
    """Both, as docs/experiments.md has them."""
    return f"{claims_table(experiment, rows)}\n\n{figures_table(experiment, rows)}"


def draw(experiment: Experiment, rows: Sequence[Row], path: Path) -> None:
    """The panels: means over seeds, with their intervals."""
    titles = {f.key: f for f in experiment.figures}
    panels = experiment.panels
    picture = new_figure(4.4 * len(panels), 3.4)
    for axes, panel in zip(picture.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        figure, some = titles[panel.figure], [r for r in rows if has(r, panel.where or {})]
        _draw_panel(axes, panel, figure, some)
    save_figure(picture, path, dpi=90)


def _draw_panel(axes: Any, panel: Panel, figure: Figure, rows: Sequence[Row]) -> None:
    """Means with their intervals, and every seed as a dot."""
    rows = [row for row in rows if panel.over in row and figure.key in row]
    ticks = list(dict.fromkeys(row[panel.over] for row in rows))
    lines = list(dict.fromkeys(row.get(panel.lines) for row in rows)) if panel.lines else [None]
    style = "o-" if all(isinstance(tick, int) for tick in ticks) else "o"
    for number, line in enumerate(lines):
        color, shift = f"C{number}", 0.1 * (number - (len(lines) - 1) / 2)
        points = []
        for place, tick in enumerate(ticks):
            at = {panel.over: tick} | ({panel.lines: line} if panel.lines else {})
            scale = 100 if figure.percent else 1
            values = [scale * value for value in values_of(rows, at, figure.key).values()]
            if len(values) > 1:
                mean, low, high = bootstrap(values)
                points.append((place + shift, mean, mean - low, high - mean))
                axes.plot([place + shift] * len(values), values, ".", color=color, alpha=0.4)
        if points:
            x, means, *errors = zip(*points, strict=True)
            label = f"{panel.lines} = {line}" if panel.lines else None
            how = {"fmt": style, "ms": 5, "lw": 1, "capsize": 3, "label": label, "color": color}
            axes.errorbar(x, means, errors, **how)
    labels = ["\n".join(textwrap.wrap(str(tick), 12)) for tick in ticks]
    axes.set_xticks(range(len(ticks)), labels, fontsize="small")
    axes.set(xlabel=panel.over, title=panel.title or figure.title)
    if figure.percent:
        axes.set_ylim(max(-5, axes.get_ylim()[0]), min(105, axes.get_ylim()[1]))
    axes.grid(alpha=0.3)
    if panel.lines:
        axes.legend(fontsize="small")


def write(name: str, experiment: Experiment, rows: Sequence[Row], folder: Path) -> None:
    """NAME.json and NAME.png into `folder`."""
    write_json(folder / f"{name}.json", {"title": experiment.title, "rows": rows})
    draw(experiment, rows, folder / f"{name}.png")
    print(f"wrote {folder / name}.json and .png")


def in_page(page: str, name: str, text: str) -> str:
    """The page with `text` between its marks `<!-- NAME -->` and `<!-- end of NAME -->`."""
    marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
    pattern = f"({re.escape(marks[0])}\n).*?({re.escape(marks[1])})"
    if not re.search(pattern, page, re.S):
        raise UserError(f"the page has no {marks[0]} ... {marks[1]}")
    return re.sub(pattern, lambda found: f"{found[1]}\n{text}\n\n{found[2]}", page, flags=re.S)


def rows_of(file: Path) -> list[Row]:
    """What `write` wrote. Error: it is not there."""
    try:
        return list(json.loads(file.read_text(encoding="utf-8"))["rows"])
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; run the experiment with --publish") from error
