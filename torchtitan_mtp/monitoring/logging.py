"""One log for the package: time and rank on every line, rank 0 speaks, the others only warn."""

import logging
import sys
from typing import TextIO

LOGGER_NAME = "torchtitan_mtp"

YELLOW, RED, RESET = "\033[33m", "\033[31m", "\033[39m"


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever `sys.stderr` is now, so that a progress bar may redirect it and back."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)  # StreamHandler's own would pin today's stream

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class LineFormatter(logging.Formatter):
    """`12:34:56 [rank 1] WARNING: message`; the rank with several ranks, the level above INFO."""

    def __init__(self, rank: int, world_size: int, color: bool) -> None:
        super().__init__("%(asctime)s", "%Y-%m-%d %H:%M:%S")
        self.rank = f"[rank {rank}] " if world_size > 1 else ""
        self.color = color

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = ""
        if record.levelno != logging.INFO:
            level = f"{record.levelname}: "
            if self.color and record.levelno >= logging.WARNING:
                level = (RED if record.levelno >= logging.ERROR else YELLOW) + level + RESET
        return f"{record.asctime} {self.rank}{level}{record.message}"


def use_color(disable_color_printing: bool = False) -> bool:
    """Whether to colour the log: on a terminal only, so that a log in a file stays plain text."""
    return sys.stderr.isatty() and not disable_color_printing


def init_logging(rank: int = 0, world_size: int = 1, *, color: bool = False) -> None:
    """Send the package's log to stderr: rank 0 from INFO on, the other ranks from WARNING on.

    May be called again (the rank is known late): it replaces its own handler.
    Messages do not propagate to the root logger, where any library's `logging.warning()` may have
    put a second handler that would print each line twice.
    """
    logger = logging.getLogger(LOGGER_NAME)
    for handler in [h for h in logger.handlers if isinstance(h, StderrHandler)]:
        logger.removeHandler(handler)
    handler = StderrHandler()
    handler.setFormatter(LineFormatter(rank, world_size, color))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
