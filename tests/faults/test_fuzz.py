"""A few hundred of the cases that scripts/fuzz.py makes; docs/reliability.md has the large runs."""

from __future__ import annotations

import faulthandler
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import fuzz
import pytest
import torch

from torchtitan_mtp.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """What the program sets for all of its process, and forks it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    logging.disable(logging.NOTSET)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("configs", 200), ("files", 50)])
def test_nothing_but_acceptance_or_one_line(kind, count, one_thread, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    status = fuzz.main([kind, "--count", str(count), "--seed", "100"])
    said = capsys.readouterr().out
    assert status == 0, said
    counts = re.fullmatch(
        rf"{kind}: {count} cases, (\d+) accepted, (\d+) refused in one line, 0 otherwise\n", said
    )
    assert counts and min(int(counts[1]), int(counts[2])) >= count // 20  # both happen


def test_a_reader_that_fails_otherwise_is_counted(tmp_path, monkeypatch):
    """The fuzzer itself: tracebacks, long messages, hangs and crashes are all noticed."""

    class TwoLines(UserError):
        def __str__(self) -> str:
            return "a\nb"

    def case(rng, folder):
        kind = rng.randrange(6)
        if kind == 0:
            raise UserError("refused")
        if kind == 1:
            raise TwoLines("")
        if kind == 2:
            raise KeyError("x")
        if kind == 3:
            while True:
                pass
        if kind == 4:
            faulthandler.disable()  # which would tell of a crash that is meant to be
            os.abort()

    monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setattr(fuzz, "make_cases", lambda kind, folder: case)
    counts = fuzz.fuzz("configs", 0, 9, seed=9)  # a seed that draws all six
    assert set(counts) == {"accepted", "refused", "not one line", "KeyError", "hang", "crash"}
    assert counts.total() == 9
    assert counts == fuzz.fuzz("configs", 0, 5, 9) + fuzz.fuzz("configs", 5, 4, 9)
