"""Draw runs beside one another: the heads' losses, acceptance of their drafts, tokens a step.

RUN is a run's dump folder with TensorBoard files. Of losses, training's are lines and held-out ones
dots; acceptance and tokens a step are measured in validation (docs/monitoring.md), where there is
one. Heads differ in colour, runs in the style of line.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtitan_mtp.cli.arguments import exit_status, new_parser, path
from torchtitan_mtp.cli.figures import check_figure, new_figure, save_figure
from torchtitan_mtp.cli.show import hue
from torchtitan_mtp.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Scalars = dict[str, list[tuple[int, float]]]
_HELD_OUT = "validation_metrics/"
_LINES, _DOTS = ("-", "--", ":", "-."), "os^Dv"


def read_scalars(run: Path) -> Scalars:
    """Tag -> (step, value) of every event file below `run`; a later start, of whatever ranks,
    replaces all that earlier ones have from its first step on."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars: dict[str, dict[int, float]] = {}
    folders = sorted({file.parent for file in run.rglob("events.out.tfevents.*")})
    if not folders:
        raise UserError(f"{run}: no TensorBoard files below it; set metrics.enable_tensorboard")
    for _, of_start in itertools.groupby(folders, _start):
        found = dict[str, dict[int, float]]()
        for folder in of_start:
            events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
            for tag in events.Tags()["scalars"]:
                values = {event.step: event.value for event in events.Scalars(tag)}
                found[tag] = found.get(tag, {}) | values
        first = min((step for values in found.values() for step in values), default=math.inf)
        for tag, values in scalars.items():
            scalars[tag] = {step: value for step, value in values.items() if step < first}
        for tag, values in found.items():
            scalars[tag] = scalars.get(tag, {}) | values
    return {tag: sorted(values.items()) for tag, values in scalars.items() if values}


def _start(folder: Path) -> Path:
    """Of one rank's folder of events, that of all ranks (`metrics.save_for_all_ranks`)."""
    return folder.parent if folder.name.startswith("rank_") else folder


def names_of(runs: Sequence[Path]) -> list[str]:
    """What tells the runs apart: the last part of their paths if it does."""
    last = [run.resolve().name for run in runs]
    return last if len(set(last)) == len(last) else [os.fspath(run) for run in runs]


def colors_of(scalars: Scalars) -> dict[int, str]:
    """The numbers of a run's heads and their colours, as in `generate.py --show`."""
    colors, head = dict[int, str](), 1
    # (Heads that learn from the trunk have no training loss to stand beside the held-out one.)
    while f"loss_metrics/mtp_head_{head}_accuracy" in scalars:
        colors[head] = hue(head).middle if head > 1 else "#444444"
        head += 1
    return colors


def draw(runs: dict[str, Scalars]) -> Figure:
    """The figure: a panel of losses and, where a run was validated, one each of acceptance and
    tokens a step. Error: a run has no heads."""
    for name, scalars in runs.items():
        if not colors_of(scalars):
            raise UserError(
                f"{name}: no loss_metrics/mtp_head_1_accuracy; is it this trainer's run?"
            )
    panels = 1 + 2 * any(f"{_HELD_OUT}tokens_per_step" in scalars for scalars in runs.values())
    figure = new_figure((7, 7, 13)[panels - 1], 3.8)
    axes = figure.subplots(1, panels, sharex=True, squeeze=False, width_ratios=(2, 1, 1)[:panels])[
        0
    ]
    axes[0].set(xlabel="step", title="loss, nats a token (dots: held out)")
    for panel, label in zip(axes[1:], ("acceptance of drafts", "tokens a step"), strict=False):
        panel.set(xlabel="step", title=f"{label}, held out")
    keys = []
    for number, (name, scalars) in enumerate(runs.items()):
        line = {"ls": _LINES[number % len(_LINES)]}
        dots = {"marker": _DOTS[number % len(_DOTS)], "ms": 5}
        draw_run(axes, scalars, line, dots)
        keys += axes[0].plot([], color="black", label=name, **line, **dots)
    colors = max(map(colors_of, runs.values()), key=len)
    heads = [axes[0].plot([], color=colors[k], label=f"head {k}")[0] for k in colors]
    axes[0].legend(handles=heads, loc="upper right")
    for panel in axes:
        panel.grid(alpha=0.3)
    if len(runs) > 1:
        figure.legend(handles=keys, loc="outside lower center", ncols=len(keys))
    return figure


def draw_run(axes: Any, scalars: Scalars, line: dict[str, Any], dots: dict[str, Any]) -> None:
    """One run into the panels that there are."""

    def curve(panel: Any, tag: str, **style: Any) -> None:
        if tag in scalars:
            panel.plot(*zip(*scalars[tag], strict=True), **style)

    for head, color in colors_of(scalars).items():
        curve(axes[0], f"loss_metrics/mtp_head_{head}_loss", color=color, lw=1, **line)
        curve(axes[0], f"{_HELD_OUT}mtp_head_{head}_loss", color=color, ls="", **dots)
        if len(axes) > 1:
            curve(axes[1], f"{_HELD_OUT}mtp_head_{head}_acceptance", color=color, **line, **dots)
    if len(axes) > 1:
        curve(axes[2], f"{_HELD_OUT}tokens_per_step", color="black", **line, **dots)


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, or 1 after one line on stderr that says what is wrong."""
    parser = new_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=path, help="a run's dump folder")
    parser.add_argument("out", metavar="OUT", type=path, help="the picture, .png, .svg or .pdf")
    args = parser.parse_args(argv)

    def program() -> None:
        check_figure(args.out)
        folders = dict(zip(names_of(args.runs), args.runs, strict=True))  # the same one once
        figure = draw({name: read_scalars(folder) for name, folder in folders.items()})
        save_figure(figure, args.out)
        print(f"wrote {args.out}: {len(folders)} run(s)")

    return exit_status(program)


if __name__ == "__main__":
    sys.exit(main())
