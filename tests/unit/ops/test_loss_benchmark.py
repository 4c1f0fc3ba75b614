"""`scripts/benchmark.py loss` at a small size: table, JSON and the limit as last row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_loss_benchmark_writes_table_and_json(tmp_path: Path) -> None:
    out = tmp_path / "loss.json"
    command = [sys.executable, "scripts/benchmark.py", "loss", "--sizes", "1024x16x8192"]
    command += ["--heads", "2", "--ops", "chunked", "naive", "--rounds", "1", "--repeats", "1"]
    run = subprocess.run(
        [*command, "--json", str(out)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(out.read_text())
    rows = {row["op"]: row for row in result["rows"]}
    assert list(rows) == ["chunked", "naive", "limit"]
    assert run.stdout.count("\n| 1024x16x8192 |") == 3
    assert "scripts/benchmark.py loss --sizes 1024x16x8192" in result["command"]
    assert result["torch"] and result["device"] and result["date"]
    # 512 rows of logits are 16 MiB; whole logits of a head 32 MiB, and naive holds some of them.
    assert rows["limit"]["peak_mib"] < rows["chunked"]["peak_mib"] < rows["naive"]["peak_mib"]
    assert rows["limit"]["cpu_s"] < rows["chunked"]["cpu_s"]
