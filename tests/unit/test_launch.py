"""run_train.sh and scripts/setup.sh, in a copy of the checkout whose Python is a stub.

The stub writes down how it was called and exits as it is told, so these tests see exactly what
would be launched, without a training and without installing anything.
"""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]

# $STUB_LOG: one line a call. $STUB_EXIT: the exit code. $STUB_WAIT: run until told to stop.
TRAINER_STUB = """#!/usr/bin/env bash
if [[ $1 == -c ]]; then echo 1; exit; fi  # the number of GPUs
if [[ -n ${STUB_WAIT:-} ]]; then
    trap 'echo "got TERM" >>"$STUB_LOG"; exit 0' TERM
    trap 'echo "got INT" >>"$STUB_LOG"; exit 0' INT
fi
echo "$* | OMP_NUM_THREADS=${OMP_NUM_THREADS:-} PWD=$PWD" >>"$STUB_LOG"
if [[ -n ${STUB_WAIT:-} ]]; then for _ in {1..300}; do sleep 0.1; done; fi
exit "${STUB_EXIT:-0}"
"""

# A python3 for set-up: `-m venv` copies the stub, `-m pip install` succeeds unless $STUB_PIP_FAILS.
INSTALLER_STUB = """#!/usr/bin/env bash
echo "$*" >>"$STUB_LOG"
case "$*" in
    "-c import sys; print("*%d*) echo "${STUB_VERSION:-3.11}" ;;
    *missing_requirements.py*) [[ -e $STUB_INSTALLED ]] || printf 'torch==9.1\\nrich==1.0\\n' ;;
    "-m venv "*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
    *"install -qq -r"*) [[ -z ${STUB_PIP_FAILS:-} ]] && touch "$STUB_INSTALLED" ;;
esac
"""


def write_script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the scripts, no .venv yet."""
    root = tmp_path / "checkout"
    (root / "scripts").mkdir(parents=True)
    for name in ("run_train.sh", "scripts/setup.sh", "pyproject.toml", "constraints.txt"):
        (root / name).write_bytes((ROOT / name).read_bytes())
    return root


@pytest.fixture
def ready(checkout: Path) -> Path:
    """A checkout that is set up, with TRAINER_STUB as its Python."""
    write_script(checkout / ".venv/bin/python", TRAINER_STUB)
    inputs = [checkout / "pyproject.toml", checkout / "constraints.txt"]
    stamp = f"{checkout}\n" + "".join(path.read_text() for path in inputs)
    (checkout / ".venv/setup-core").write_text(stamp)
    return checkout


def environment(root: Path, **variables: str) -> dict[str, str]:
    ours = {"NGPU", "CONFIG_FILE", "LOG_RANK", "OMP_NUM_THREADS"}
    kept = {key: value for key, value in os.environ.items() if key not in ours}
    return {**kept, "STUB_LOG": str(root / "log"), **variables}


def launch(root: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run run_train.sh from a folder that is not the checkout."""
    elsewhere = root.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    return subprocess.run(
        ["bash", str(root / "run_train.sh"), *arguments],
        cwd=elsewhere,
        env=environment(root, **variables),
        capture_output=True,
        text=True,
        timeout=60,
    )


def calls(root: Path) -> list[str]:
    log = root / "log"
    return log.read_text().splitlines() if log.exists() else []


def test_one_process_is_plain_python_in_the_callers_folder(ready: Path) -> None:
    result = launch(ready, "--training.steps", "3", NGPU="1")
    assert result.returncode == 0, result.stderr
    (call,) = calls(ready)
    command, _, rest = call.partition(" | ")
    config = ready / "train_configs/quickstart.toml"
    assert command == f"-m torchtitan_mtp.train --job.config_file {config} --training.steps 3"
    assert rest.endswith(f"PWD={ready.parent / 'elsewhere'}")


def test_several_processes_go_through_torchrun(ready: Path) -> None:
    launch(ready, "--training.steps", "3", NGPU="4", LOG_RANK="0,2", CONFIG_FILE="my.toml")
    (call,) = calls(ready)
    assert call.startswith(
        "-m torch.distributed.run --nproc_per_node=4 --rdzv_backend c10d "
        "--rdzv_endpoint=localhost:0 --local-ranks-filter 0,2 --role rank --tee 3 "
        "-m torchtitan_mtp.train --job.config_file my.toml --training.steps 3 | "
    )


@pytest.mark.parametrize("processes", [2, 1000])
def test_processes_share_the_cores(ready: Path, processes: int) -> None:
    launch(ready, "--training.steps", "3", NGPU=str(processes))
    threads = re.search(r"OMP_NUM_THREADS=(\d*)", calls(ready)[0])
    cores = len(os.sched_getaffinity(0))
    assert threads is not None
    assert int(threads[1]) == max(1, cores // processes)


@pytest.mark.parametrize(
    "form", ["--job.config_file F", "--job.config-file F", "--job.config_file=F"]
)
def test_a_config_file_among_the_arguments_wins(ready: Path, form: str) -> None:
    launch(ready, *form.split(), CONFIG_FILE="other.toml")
    assert calls(ready)[0].startswith(f"-m torchtitan_mtp.train {form} | ")


@pytest.mark.parametrize("value", ["0", "two", "-1", "1.5"])
def test_a_wrong_number_of_processes_is_one_line(ready: Path, value: str) -> None:
    result = launch(ready, NGPU=value)
    assert result.returncode == 1
    assert result.stderr == f"error: NGPU is '{value}'; expected a number of processes, 1 or more\n"
    assert calls(ready) == []


@pytest.mark.parametrize("processes", ["1", "2"])
def test_the_exit_code_is_the_trainers(ready: Path, processes: str) -> None:
    assert launch(ready, "--x", NGPU=processes, STUB_EXIT="7").returncode == 7


def test_the_quickstart_trains_then_samples(ready: Path) -> None:
    result = launch(ready)
    assert result.returncode == 0, result.stderr
    train, sample = [call.partition(" | ")[0] for call in calls(ready)]
    config = ready / "train_configs/quickstart.toml"
    assert train == f"-m torchtitan_mtp.train --job.config_file {config}"
    flags = "--max_new_tokens 200 --temperature 0.8 --speculative --compare"
    generate = ready / "scripts/generate.py"
    assert sample == f"{generate} outputs/quickstart --prompt def  {flags}"
    assert f"{generate} outputs/quickstart --prompt def\\  {flags}" in result.stdout


def test_a_chosen_recipe_is_not_followed_by_samples(ready: Path) -> None:
    launch(ready, CONFIG_FILE="my.toml")
    assert len(calls(ready)) == 1


def test_a_failed_quickstart_does_not_sample(ready: Path) -> None:
    assert launch(ready, STUB_EXIT="3").returncode == 3
    assert len(calls(ready)) == 1


def catches(process: int, number: int) -> bool:
    """Whether it has a handler for a signal."""
    status = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.M)
    assert found is not None
    return bool(int(found[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_the_quickstart_passes_signals_on(ready: Path, name: str) -> None:
    process = subprocess.Popen(
        ["bash", str(ready / "run_train.sh")],
        env=environment(ready, STUB_WAIT="1"),
        start_new_session=True,
    )
    try:
        # The stub writes down its call once it has its traps; the script sets its own meanwhile.
        while not (calls(ready) and catches(process.pid, signal.SIGTERM)):
            time.sleep(0.02)
        process.send_signal(getattr(signal, f"SIG{name}"))
        assert process.wait(120) == 0  # the trainer saved and left with 0: so does the script
    finally:
        process.kill()
    assert calls(ready)[1:] == [f"got {name}"]  # stopped: no samples


def test_the_quickstart_recipe_writes_where_the_samples_are_read() -> None:
    recipe = (ROOT / "train_configs/quickstart.toml").read_text(encoding="utf-8")
    folder = re.search(r'^dump_folder\s*=\s*"(.*)"', recipe, re.M)
    assert folder is not None
    assert folder[1].removeprefix("./") == "outputs/quickstart"


def set_up(root: Path, group: str = "core", **variables: str) -> subprocess.CompletedProcess[str]:
    """Source setup.sh with INSTALLER_STUB as python3; prints what PYTHON became."""
    write_script(root / "bin/python3", INSTALLER_STUB)
    path = f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}"
    installed = str(root / "installed")
    script = f"set -euo pipefail; source {root}/scripts/setup.sh {group}; echo $PYTHON"
    return subprocess.run(
        ["bash", "-c", script],
        env=environment(root, PATH=path, STUB_INSTALLED=installed, **variables),
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_set_up_installs_once(checkout: Path) -> None:
    first = set_up(checkout)
    python = checkout / ".venv/bin/python"
    assert (first.returncode, first.stdout) == (0, f"{python}\n"), first.stderr
    assert first.stderr == "installing torch 9.1 and 1 packages into .venv (once)\n"
    before = calls(checkout)
    second = set_up(checkout)
    assert (second.returncode, second.stdout, second.stderr) == (0, f"{python}\n", "")
    assert calls(checkout) == before  # not even Python is started


def test_set_up_uses_a_python_that_has_everything(checkout: Path) -> None:
    (checkout / "installed").touch()
    result = set_up(checkout)
    assert (result.returncode, result.stdout) == (0, f"{checkout / 'bin/python3'}\n")
    assert not (checkout / ".venv").exists()


def test_set_up_starts_again_after_a_failure(checkout: Path) -> None:
    failed = set_up(checkout, STUB_PIP_FAILS="1")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("error: pip could not install into ")
    assert not list((checkout / ".venv").glob("setup-*"))
    assert set_up(checkout).returncode == 0
    assert (checkout / ".venv/setup-core").exists()


def test_set_up_looks_again_when_requirements_change(checkout: Path) -> None:
    assert set_up(checkout, "dev").returncode == 0
    assert set_up(checkout, "core").returncode == 0  # dev has all of core
    before = len(calls(checkout))
    with (checkout / "constraints.txt").open("a") as file:
        file.write("another==1.0\n")
    assert set_up(checkout).returncode == 0
    assert len(calls(checkout)) > before


def test_set_up_refuses_an_old_python(checkout: Path) -> None:
    result = set_up(checkout, STUB_VERSION="3.9")
    assert result.returncode == 1
    assert re.fullmatch(r"error: .*/python3 is Python 3\.9; .* 3\.10 or newer .*\n", result.stderr)


def test_set_up_refuses_an_unknown_group(checkout: Path) -> None:
    result = set_up(checkout, "all")
    assert result.returncode == 1
    assert result.stderr == "error: setup.sh takes core, dev or docs, got 'all'\n"


def test_the_fast_tests_are_there(ready: Path) -> None:
    (ready / "scripts/test.sh").write_bytes((ROOT / "scripts/test.sh").read_bytes())
    (ready / ".venv/setup-core").rename(ready / ".venv/setup-dev")
    command = ["bash", str(ready / "scripts/test.sh"), "fast", "-x"]
    subprocess.run(command, env=environment(ready), check=True, timeout=60)
    (call,) = calls(ready)
    options, *rest = call.partition(" | ")[0].split(" tests/")
    assert options == (
        "-m pytest -n 3 --dist loadfile --no-loadscope-reorder -m not slow and not exhaustive"
    )
    *others, last = rest
    paths = [*others, last.removesuffix(" -x")]
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / "tests" / path).exists()] == []


@pytest.fixture(scope="module")
def requirements() -> ModuleType:
    file = ROOT / "scripts/missing_requirements.py"
    spec = importlib.util.spec_from_file_location("missing_requirements", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("installed", "requirement", "satisfied"),
    [
        ("2.11.0", "torch>=2.11", True),
        ("2.11.0a0+vendor.26.2", "torch>=2.11", True),
        ("2.13.0+cpu", "torch>=2.11", True),
        ("2.9.1", "torch>=2.11", False),
        ("0.0.1", "torch", True),
        ("3.6.0", f'triton>=3.7; sys_platform == "{sys.platform}"', False),
        ("3.6.0", 'triton>=3.7; sys_platform == "plan9"', True),
    ],
)
def test_vendor_builds_count_as_their_release(
    requirements: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    installed: str,
    requirement: str,
    satisfied: bool,
) -> None:
    monkeypatch.setattr(requirements.metadata, "version", lambda name: installed)
    assert requirements.is_satisfied(requirement) is satisfied


def test_a_package_that_is_not_there_is_missing(requirements: ModuleType) -> None:
    assert not requirements.is_satisfied("no-such-package-at-all")


def test_every_requirement_of_a_checkout_is_pinned_and_every_pin_is_used(
    requirements: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(requirements, "is_satisfied", lambda requirement: False)
    requirements.main("dev")
    requirements.main("docs")
    printed = set(capsys.readouterr().out.splitlines())
    assert all("==" in line for line in printed)
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(printed) == sorted(line for line in constraints if "==" in line)
