"""A few hundred of the cases that scripts/fuzz.py makes; docs/reliability.md has the large runs."""

from __future__ import annotations

import faulthandler
import os
import re
from pathlib import Path

import fuzz
import pytest

import forked
from torchtitan_mtp.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("configs", 100), ("files", 30)])
def test_nothing_but_acceptance_or_one_line(kind, count):
    # Not in this process: it forks, and a fork never gets the locks that threads here hold.
    done = forked.python(["scripts/fuzz.py", kind, "--count", str(count), "--seed", "100"], ROOT)
    said = done.stdout
    assert done.returncode == 0, said + done.stderr
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
