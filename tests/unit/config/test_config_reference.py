"""docs/config.md says what the dataclasses say."""

import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.config.setting import options

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "scripts" / "write_config_reference.py"


@pytest.fixture(scope="module")
def writer():
    spec = importlib.util.spec_from_file_location("write_config_reference", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_up_to_date(writer):
    assert writer.REFERENCE.read_text(encoding="utf-8") == writer.reference(), (
        "run python scripts/write_config_reference.py"
    )


def test_every_key_is_in_its_section(writer):
    sections = writer.reference().split("\n## ")
    for option in options(JobConfig).values():
        if not option.is_table:
            (section,) = [s for s in sections if s.startswith(f"[{'.'.join(option.path[:-1])}]")]
            assert f"\n| `{option.path[-1]}` |" in section, option.name


@dataclass
class Undocumented:
    documented: int = 1
    """Has a docstring."""
    bare: int = 2


def test_a_field_without_docstring_is_an_error(writer):
    with pytest.raises(ValueError, match=r"^Undocumented\.bare has no docstring"):
        writer.field_docs(Undocumented)


def test_check_exits_with_1_when_stale(writer, monkeypatch, tmp_path, capsys):
    stale = tmp_path / "config.md"
    monkeypatch.setattr(writer, "REFERENCE", stale)
    monkeypatch.setattr(sys, "argv", ["write_config_reference.py", "--check"])
    assert writer.main() == 1
    assert "out of date" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["write_config_reference.py"])
    assert writer.main() == 0
    monkeypatch.setattr(sys, "argv", ["write_config_reference.py", "--check"])
    assert writer.main() == 0
    stale.write_text(stale.read_text() + "x")
    assert writer.main() == 1


def test_it_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--check"],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
