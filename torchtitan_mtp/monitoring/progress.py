"""The progress bar below the log lines, on a terminal."""

import math
import sys
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Pace:
    """Seconds a step: the mean of about the last ten lines, which from one line to the next at most
    doubles or halves, however unevenly a machine is shared."""

    def __init__(self) -> None:
        self.seconds, self.lines = math.nan, -1  # the first has the start's compilation

    def add(self, seconds: float, steps: int) -> None:
        """A line: `steps` took `seconds`."""
        self.lines += 1
        if self.lines < 1:
            return
        before = self.seconds if self.lines > 1 else seconds / steps
        mean = before + (seconds / steps - before) / min(self.lines, 10)
        self.seconds = min(max(mean, before / 2), 2 * before)

    def time_left(self, steps: int) -> str:
        """Of `steps`, such as "0:12:40"; "-" before the second line."""
        return str(timedelta(seconds=round(self.seconds * steps))) if self.lines > 0 else "-"


class ProgressBar:
    """Steps done, loss, speed and time left; where `shown`, and stderr is a terminal.

    While it lives, rich redirects `sys.stderr`, so that log lines appear above the bar.
    """

    def __init__(
        self, total_steps: int, start_step: int = 0, color: bool = True, shown: bool = True
    ) -> None:
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True, no_color=not color),
            refresh_per_second=2,
            transient=True,
            disable=not (shown and sys.stderr.isatty()),
        )
        self.task = self.progress.add_task(
            "", total=total_steps, completed=start_step, status="starting"
        )
        self.progress.start()

    def update(self, step: int, status: str | None = None) -> None:
        fields: dict[str, Any] = {} if status is None else {"status": status}
        self.progress.update(self.task, completed=step, **fields)

    def close(self) -> None:
        self.progress.stop()
