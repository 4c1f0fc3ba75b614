"""The progress bar below the log lines, on a terminal."""

import sys

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from torchtitan_mtp.monitoring.logging import use_color


class ProgressBar:
    """Steps done, loss, speed and time left. Draws nothing where stderr is not a terminal.

    While it lives, rich redirects `sys.stderr`, so that log lines appear above the bar.
    """

    def __init__(self, total_steps: int, start_step: int = 0, *, color: bool = True) -> None:
        self.progress: Progress | None = None
        if not sys.stderr.isatty():
            return
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True, no_color=not (color and use_color())),
            refresh_per_second=2,
            transient=True,
        )
        self.task = self.progress.add_task(
            "", total=total_steps, completed=start_step, status="starting"
        )
        self.progress.start()

    def update(self, step: int, status: str | None = None) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=step)
            if status is not None:
                self.progress.update(self.task, status=status)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
