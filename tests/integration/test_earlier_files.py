"""What earlier versions of this program wrote loads and computes what it did.

tests/fixtures/earlier is from November 2026, when `mtp.engine` was "joint" (the default) or
"sequential": a run's folder after step 1 of 2 (run.tar.xz), a chain's export in glm4_moe_hf, the
config.toml of a run that starts from it, and in expected.json what that version logged then.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest

from runs import Run, train
from torchtitan_mtp.config import parse_args
from torchtitan_mtp.inference import generate, load_for_inference

EARLIER = Path(__file__).parents[1] / "fixtures" / "earlier"


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    """What it logged; the files are in the working directory."""
    shutil.copytree(EARLIER, tmp_path, dirs_exist_ok=True)
    with tarfile.open(tmp_path / "run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return json.loads(Path("expected.json").read_text())


def logged(run: Run) -> dict[str, list[float]]:
    """Step -> every head's loss and the gradients' norm."""
    return {str(s["step"]): [*s["head_losses"], s["grad_norm"]] for s in run.logged}


def numbers(step: dict[str, list[str] | str]) -> list[float]:
    return [float.fromhex(x) for x in [*step["losses"], step["grad_norm"]]]


def test_a_run_goes_on(earlier):
    prompt, tokens = [[98, 99, 100, 32]], earlier["run continues"]
    assert generate(load_for_inference("run")[0], prompt, len(tokens)).tokens == [tokens]
    run = train(parse_args(["--job.config_file", "run/config.toml"]))
    assert run.start == 1
    assert logged(run) == {"2": pytest.approx(numbers(earlier["run"]["2"]), rel=1e-6)}


def test_an_export_starts_a_run(earlier):
    prompt, tokens = [[98, 99, 100, 32]], earlier["export continues"]
    assert generate(load_for_inference("export")[0], prompt, len(tokens)).tokens == [tokens]
    run = train(parse_args(["--job.config_file", "written_chain.toml"]))
    assert logged(run) == {"1": pytest.approx(numbers(earlier["export"]["1"]), rel=1e-6)}
