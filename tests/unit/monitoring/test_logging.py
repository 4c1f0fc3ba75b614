"""The package's log on stderr."""

import io
import logging
import re
import sys
from collections.abc import Iterator

import pytest

from torchtitan_mtp.monitoring.logging import StderrHandler, init_logging, use_color
from torchtitan_mtp.monitoring.progress import ProgressBar

logger = logging.getLogger("torchtitan_mtp.monitoring")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    package = logging.getLogger("torchtitan_mtp")
    before = package.handlers[:], package.level, package.propagate
    yield
    package.handlers[:], package.level, package.propagate = before


def test_one_process_has_time_and_message(capsys: pytest.CaptureFixture[str]) -> None:
    init_logging()
    logger.info("loss %.1f", 2.5)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d loss 2.5\n", capsys.readouterr().err)


def test_other_ranks_only_warn_and_name_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    init_logging(rank=3, world_size=4)
    logger.info("said by rank 0 alone")
    logger.warning("slow")
    assert re.fullmatch(r"\S+ \S+ \[rank 3\] WARNING: slow\n", capsys.readouterr().err)


def test_called_twice_it_prints_once(capsys: pytest.CaptureFixture[str]) -> None:
    init_logging()
    init_logging()
    logger.info("hello")
    assert capsys.readouterr().err.count("hello") == 1
    handlers = logging.getLogger("torchtitan_mtp").handlers
    assert sum(isinstance(h, StderrHandler) for h in handlers) == 1


def test_a_handler_on_the_root_logger_adds_no_second_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    root_handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(root_handler)
    try:
        init_logging()
        logger.info("hello")
    finally:
        logging.getLogger().removeHandler(root_handler)
    assert capsys.readouterr().err.count("hello") == 1


def test_levels_are_coloured_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    for color in (False, True):
        init_logging(color=color)
        logger.error("bad")
        assert ("\033[31mERROR: \033[39mbad" in capsys.readouterr().err) is color


def test_exceptions_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    init_logging()
    try:
        raise ValueError("inner")
    except ValueError:
        logger.exception("outer")
    error = capsys.readouterr().err
    assert "ERROR: outer\nTraceback" in error and error.endswith("ValueError: inner\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_no_colour_and_no_bar_off_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    bar = ProgressBar(10)
    bar.update(5, "loss 1.0")
    bar.close()
    assert stream.getvalue() == "" and not use_color()


def test_bar_on_a_terminal_leaves_the_lines_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    init_logging()
    bar = ProgressBar(10, color=False)
    logger.info("a line above the bar")
    bar.update(7, "loss 1.0")
    bar.close()
    assert sys.stderr is terminal, "rich has given stderr back"
    assert re.search(r"\d a line above the bar\s", terminal.getvalue())
    assert "7/10" in terminal.getvalue() and "loss 1.0" in terminal.getvalue()
