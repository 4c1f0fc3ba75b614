"""What only watches a run never ends it: each place that can't be written gives one warning."""

import errno
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.summary.writer.record_writer import RecordWriter

from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.inference.acceptance import Acceptance
from torchtitan_mtp.monitoring import metrics as metrics_module
from torchtitan_mtp.monitoring.losses import HeadLosses
from torchtitan_mtp.monitoring.metrics import MetricsProcessor
from torchtitan_mtp.monitoring.profiling import Profiling

CPU = torch.device("cpu")


def full(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """The package's warnings so far."""
    logger = logging.getLogger("torchtitan_mtp")
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)


@pytest.fixture
def config(tmp_path: Path) -> JobConfig:
    config = JobConfig()
    config.job.dump_folder = str(tmp_path / "run")
    config.metrics.log_freq = config.profiling.profiler_warmup = (
        config.profiling.profiler_active
    ) = 1
    config.profiling.profile_freq = 3
    return config


def run(config: JobConfig) -> None:
    """Thirty steps, as the trainer reports them, with a validation."""
    metrics = MetricsProcessor(config, device=CPU, flops_per_token=1e6, peak_flops=None)
    heads = HeadLosses([0.5], [0.5], [9], 1.0, 1.0)
    for step in range(1, 31):
        metrics.record_step(tokens=1, data_seconds=0.0)
        metrics.log(step, heads, {"grad_norm": 1.0})
    metrics.log_validation(30, heads, Acceptance([], [], [], []), tokens=9, elapsed=1.0)
    metrics.close()


@pytest.mark.parametrize("what", ["no folder", "full at once", "full later"])
def test_event_files_that_cannot_be_written(
    what: str, config: JobConfig, warnings: list[str], monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    config.metrics.enable_tensorboard = True
    write, left = RecordWriter.write, [0 if what == "full at once" else 40]

    def write_until_full(self: RecordWriter, data: bytes) -> None:
        left[0] -= 1
        (write if left[0] >= 0 else full)(self, data)

    if what == "no folder":
        Path(config.job.dump_folder).write_text("a file")
    else:
        monkeypatch.setattr(RecordWriter, "write", write_until_full)
    run(config)
    (warning,) = warnings
    reason = "Not a directory" if what == "no folder" else "No space left on device"
    assert warning.startswith("TensorBoard: ") and reason in warning
    assert warning.endswith("; the run goes on without it")
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_weights_and_biases_that_fails(
    broken: str, config: JobConfig, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config.metrics.enable_wandb = True

    names = ("init", "log", "finish")
    wandb = SimpleNamespace()
    vars(wandb).update(dict.fromkeys(names, lambda *_, **__: wandb) | {broken: full})
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run(config)
    assert len(warnings) == 1 and warnings[0].startswith("Weights & Biases: [Errno 28]")


@pytest.mark.parametrize("broken", ["__init__", "update", "close"])
def test_a_progress_bar_that_fails(
    broken: str, config: JobConfig, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_module.ProgressBar, broken, full)
    run(config)
    assert len(warnings) == 1 and warnings[0].startswith("progress bar: [Errno 28]")


@pytest.mark.parametrize(
    ("blocked", "reason"),
    [
        ("run", "Not a directory"),
        ("run/profile_traces/iteration_3/rank0_trace.json", "Is a directory"),
        ("full", "is not whole: is the disk full?"),
    ],
)
def test_traces_that_cannot_be_written(
    blocked: str,
    reason: str,
    config: JobConfig,
    tmp_path: Path,
    warnings: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file in place of the folder was a SIGSEGV."""
    config.profiling.enable_profiling = True
    if blocked == "run":
        (tmp_path / blocked).write_text("a file")
    elif blocked == "full":  # the profiler leaves half a file, without a word
        monkeypatch.setattr(
            torch.profiler.profile,
            "export_chrome_trace",
            lambda self, path: Path(path).write_text('{"traceEvents": ['),
        )
    else:
        (tmp_path / blocked / "held").mkdir(parents=True)
    with Profiling(config, device=CPU) as profiler:
        for _ in range(9):
            torch.ones(2) + 1
            profiler.step()
    assert len(warnings) == 1 and warnings[0].startswith("profiler traces: ")
    assert reason in warnings[0]


def test_snapshots_that_cannot_be_written(
    config: JobConfig, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And memory that runs out is still what ends the run."""
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **_: None)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {})
    config.profiling.enable_memory_snapshot = True
    Path(config.job.dump_folder).write_text("a file")
    with (
        pytest.raises(torch.OutOfMemoryError),
        Profiling(config, device=torch.device("cuda")) as memory,
    ):
        for _ in range(9):
            memory.step()
        raise torch.OutOfMemoryError("no more")
    assert len(warnings) == 1 and warnings[0].startswith("memory snapshots: [Errno 20]")


def test_a_printed_configuration_that_nobody_takes() -> None:
    """Into a pipe that nobody reads any more; the training in it is an empty one."""
    program = (
        "import types, torchtitan_mtp.trainer as trainer\n"
        "from torchtitan_mtp import train\n"
        "nothing, stopping = (lambda: None), types.SimpleNamespace(signal=None)\n"
        "run = types.SimpleNamespace(train=nothing, close=nothing, stopping=stopping)\n"
        "trainer.Trainer = lambda config: run\n"
        "raise SystemExit(train.main(['--job.print_config']))"
    )
    source, target = os.pipe()
    os.close(source)
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=target, stderr=subprocess.PIPE, text=True
    )
    os.close(target)
    lines = [line for line in done.stderr.splitlines() if "stdout" in line]
    assert done.returncode == 0 and len(lines) == 1
    assert lines[0].endswith("stdout: [Errno 32] Broken pipe; the run goes on without it")


def test_a_process_without_output_goes_on(tmp_path):
    """Started with stdout and stderr closed: what is printed is lost, and nothing else."""
    program = (
        "import sys; from torchtitan_mtp import train; train._open_closed_streams();"
        f"file = open({str(tmp_path / 'file')!r}, 'w');"
        "print('lost'); print('too', file=sys.stderr);"
        "sys.stdout.flush(); sys.stderr.flush(); file.write('kept'); file.close()"
    )
    command = ["sh", "-c", 'exec "$0" -c "$1" >&- 2>&-', sys.executable, program]
    assert subprocess.run(command, timeout=60).returncode == 0
    assert (tmp_path / "file").read_text() == "kept"
