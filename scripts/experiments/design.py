"""What an experiment is made of: runs, the figures of its table, its claims, its picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.measures import Measure

Factors = Mapping[str, str | int]  # what tells one variant from another: {"n": 2, "width": 64}
Row = dict[str, Any]  # of a run: its factors, "seed", and its figures by name
Settings = Mapping[str, Any]  # keys of the configuration, as in {"mtp.num_future_tokens": 2}


@dataclass(frozen=True)
class Run:
    """One training, and what is measured of the model that comes out.

    Attributes:
        factors: of its variant.
        seed: of initialisation and data order; runs of one seed are compared with one another.
        settings: keys of the configuration beside those of `runs.BASE`.
        measures: what is measured; their figures go into the row of the run.
        start: the variant whose weights, of the same seed, it starts from; None: from scratch.
    """

    factors: Factors
    seed: int
    settings: Settings
    measures: Sequence[Measure]
    start: Factors | None = None

    @property
    def name(self) -> str:
        """Its folder."""
        return folder_name(self.factors, self.seed)


def folder_name(factors: Factors, seed: int) -> str:
    """The folder of a variant's run: "n-2_width-64_seed-0"."""
    parts = [f"{key}-{value}" for key, value in {**factors, "seed": seed}.items()]
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in "_".join(parts))


@dataclass(frozen=True)
class Figure:
    """A column of the table. key: of the measured figure; percent: shown times 100; interval: shown
    beside the mean."""

    key: str
    title: str
    digits: int = 2
    percent: bool = False
    interval: bool = True

    def text(self, value: float, sign: str = "") -> str:
        scaled = 100 * value if self.percent else value
        return f"{scaled:{sign},.{self.digits}f}"


@dataclass(frozen=True)
class Claim:
    """That a figure is larger (`sign` = 1) or smaller (-1) for one variant than for another, or
    than a number.

    source: the paper's section that says so; empty: nobody's, a question of this project.
    """

    says: str
    source: str
    figure: str
    of: Factors
    than: Factors | float
    sign: int


@dataclass(frozen=True)
class Panel:
    """A panel of the picture: a figure over a factor, a line for each value of another one, of the
    variants that have all of `where`."""

    figure: str
    over: str
    lines: str | None = None
    where: Factors | None = None
    title: str = ""


@dataclass(frozen=True)
class Experiment:
    """A claim of the papers as runs.

    Attributes:
        title: in one line.
        prepare: writes the texts of the runs into a folder, once; small ones where asked.
        runs: of a folder that `prepare` filled and seeds, all runs; small ones where asked.
        figures, claims, panels: what is shown of them.
    """

    title: str
    prepare: Callable[[Path, bool], None]
    runs: Callable[[Path, Sequence[int], bool], list[Run]]
    figures: Sequence[Figure]
    claims: Sequence[Claim]
    panels: Sequence[Panel]
