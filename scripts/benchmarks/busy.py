"""`benchmark.py busy`: a short training alone, and beside programs that want the same cores."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.report import report
from torchtitan_mtp.errors import UserError

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "as it comes": {},
    "always spinning": {"GOMP_SPINCOUNT": "300000"},  # what libgomp does by itself
    "never spinning": {"OMP_WAIT_POLICY": "passive"},
}


def run(
    loops: tuple[int, ...] = (0, 1, 2),
    settings: tuple[str, ...] = ("as it comes",),
    steps: int = 60,
    config: Path = ROOT / "train_configs/quickstart.toml",
    json: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Whole processes: start, steps, end; no validation, no checkpoint.

    The last column is the time over that of the first row of the same setting.

    Args:
        loops: busy loops beside the training, one process each.
        settings: "as it comes", and for comparison "always spinning", "never spinning".
        steps: optimizer steps.
        config: what is trained.
        json: file for the figures.
        plot: PNG file for a bar chart.
    """
    rows = []
    for setting in settings:
        if setting not in SETTINGS:
            raise UserError(f"--settings {setting!r}: expected one of {', '.join(SETTINGS)}")
        first = None
        for count in loops:
            seconds = _seconds(config, steps, count, SETTINGS[setting])
            first = first or seconds
            rows.append(
                {
                    "setting": setting,
                    "loops": count,
                    "s": seconds,
                    "over the first": seconds / first,
                }
            )
    report(rows, json, plot, bars=("over the first",))


def _seconds(config: Path, steps: int, loops: int, variables: dict[str, str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torchtitan_mtp.train", "--job.config_file", str(config)]
        command += ["--job.dump_folder", folder, "--training.steps", str(steps)]
        command += ["--validation.no_enable", "--checkpoint.no_enable"]
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
        try:
            start = time.perf_counter()
            training = subprocess.run(
                command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True
            )
            seconds = time.perf_counter() - start
        finally:
            for process in busy:
                process.kill()
                process.wait()
    if training.returncode:
        raise UserError(f"{config}: {training.stderr.strip().splitlines()[-1]}")
    return seconds
