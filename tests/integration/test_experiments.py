"""scripts/experiment.py, as it is called: every experiment in small, and going on after a stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from experiment import main, parse_arguments, run_experiment
from experiments.runs import workers

from torchtitan_mtp.checkpoint.lock import lock_folders
from torchtitan_mtp.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = ("induction", "arithmetic", "tokens", "families", "curriculum")


def experiment(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/experiment.py"), *arguments, "--seeds", "2"]
    command += ["--output", str(folder), "--jobs", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all of them were run."""
    folder = tmp_path_factory.mktemp("experiments")
    done = experiment(folder, "all", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_in_small(folder: Path, name: str) -> None:
    results = json.loads((folder / f"{name}.json").read_text())
    assert len(list((folder / f"{name}-quick").glob("*/result.json"))) == len(results["rows"])
    assert {row["seed"] for row in results["rows"]} == {0, 1}
    for row in results["rows"]:
        assert row["seconds"] > 0 and row.get("parameters", 1) > 0
    first, second = results["rows"][:2]
    assert first["seed"] != second["seed"]
    if name in ("tokens", "families", "curriculum"):  # other weights, another order of the data
        assert first["loss 1"] != second["loss 1"] > 0
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_fine_tuning_starts_from_its_training(folder: Path) -> None:
    run = folder / "curriculum-quick/pre-training-n---4_n--1_seed-1"
    log = (run / "log.txt").read_text()
    assert f"loaded weights from {folder}/curriculum-quick/pre-training-n---4_n---_seed-1" in log


def test_finished_runs_are_kept_and_others_run_again(folder: Path) -> None:
    runs = sorted((folder / "induction-quick").glob("width*"))
    before = {run: (run / "result.json").stat().st_mtime_ns for run in runs}
    rows = json.loads((folder / "induction.json").read_text())["rows"]
    (runs[0] / "result.json").unlink()  # as if it had been stopped in its midst
    changed = json.loads((runs[1] / "result.json").read_text())
    changed["measures"] = ["another()"]  # as if it were of an earlier version
    (runs[1] / "result.json").write_text(json.dumps(changed))
    changed = json.loads((runs[2] / "trained.json").read_text())
    changed["as"]["settings"]["training.steps"] = 7
    (runs[2] / "trained.json").write_text(json.dumps(changed))
    (runs[2] / "result.json").unlink()
    trained = {run: (run / "checkpoint/step-2/.metadata").stat().st_mtime_ns for run in runs}
    done = experiment(folder, "induction", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    again = {run for run in runs if (run / "result.json").stat().st_mtime_ns != before[run]}
    assert again == {runs[0], runs[1], runs[2]}
    assert done.stdout.count(" s\n") == 3
    anew = {r for r in runs if (r / "checkpoint/step-2/.metadata").stat().st_mtime_ns != trained[r]}
    assert anew == {runs[2]}  # the others' weights are kept, and measured again
    now = json.loads((folder / "induction.json").read_text())["rows"]
    assert [{**row, "seconds": 0} for row in now] == [{**row, "seconds": 0} for row in rows]


def test_a_folder_is_one_programs_at_a_time(tmp_path: Path) -> None:
    args = parse_arguments(["tokens", "--quick", "--output", str(tmp_path)])
    with ExitStack() as held, workers(1) as pool:
        lock_folders({tmp_path / "tokens-quick": "--output"}, held)
        with pytest.raises(UserError, match=r"quick: another run writes .* another --output"):
            run_experiment("tokens", args, pool, ExitStack())
    assert [file.name for file in (tmp_path / "tokens-quick").iterdir()] == ["run.lock"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("induction --quick --publish", "--publish: --quick measures nothing"),
        ("induction --seeds 1", "--seeds 1: expected 2 to 10"),
        ("induction --jobs 0", "--jobs 0: expected 1 or more"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments.split()) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ") and said in told and told.count("\n") == 1
