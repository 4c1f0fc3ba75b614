"""Every program of torchtitan_mtp/cli can be called as `python scripts/NAME.py`."""

import importlib
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PROGRAMS = sorted(
    path.stem
    for path in (ROOT / "torchtitan_mtp/cli").glob("*.py")
    if "def main(" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_caller_runs_the_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = importlib.import_module(f"torchtitan_mtp.cli.{name}")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(program, "main", lambda: 7)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
    assert stopped.value.code == 7
