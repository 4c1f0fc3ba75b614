"""Draw the heads' losses of a run.

RUN is a run's dump folder with TensorBoard files; training losses are lines, held-out ones dots.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from torchtitan_mtp.cli.arguments import exit_status, path
from torchtitan_mtp.cli.figures import new_figure
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.writing import written_whole


def read_scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) of every event file below `run`, a later start's values last."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars: dict[str, dict[int, float]] = {}
    folders = sorted({file.parent for file in run.rglob("events.out.tfevents.*")})
    if not folders:
        raise UserError(f"{run}: no TensorBoard files below it; set metrics.enable_tensorboard")
    for folder in folders:
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            values = scalars.setdefault(tag, {})
            values.update({event.step: event.value for event in events.Scalars(tag)})
    return {tag: sorted(values.items()) for tag, values in scalars.items()}


def plot(scalars: dict[str, list[tuple[int, float]]], out: Path) -> int:
    """Write the picture; returns the number of heads in it."""
    axes = (figure := new_figure(7, 3.6)).subplots()
    head = 0

    def points(tag: str) -> tuple[Any, Any]:
        """Steps and values."""
        steps, values = zip(*scalars[tag], strict=True) if tag in scalars else ((), ())
        return steps, values

    # (Heads that learn from the trunk have no training loss to stand beside the held-out one.)
    while f"loss_metrics/mtp_head_{head + 1}_accuracy" in scalars:
        head += 1
        color, curve = f"C{head - 1}", points(f"loss_metrics/mtp_head_{head}_loss")
        axes.plot(*curve, color=color, lw=1, label=f"head {head}")
        axes.scatter(*points(f"validation_metrics/mtp_head_{head}_loss"), c=color)
    if head == 0:
        raise UserError("the run has no loss_metrics/mtp_head_1_loss; is it a run of this trainer?")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    with written_whole(out) as file:
        figure.savefig(file, dpi=110)
    return head


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=path, help="a run's dump folder")
    parser.add_argument("out", type=path, help="the picture, .png or .svg")
    args = parser.parse_args()

    def program() -> None:
        heads = plot(read_scalars(args.run), args.out)
        print(f"wrote {args.out}: {heads} heads")

    return exit_status(program)


if __name__ == "__main__":
    sys.exit(main())
