"""Traces and snapshots at the steps that were asked for."""

import json
from pathlib import Path

import pytest
import torch

from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.monitoring import profiling
from torchtitan_mtp.monitoring.profiling import Profiling

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path: Path) -> JobConfig:
    config = JobConfig()
    config.job.dump_folder = str(tmp_path)
    config.profiling.profile_freq = 3
    config.profiling.profiler_warmup = 1
    config.profiling.profiler_active = 1
    return config


def test_off_writes_nothing(config: JobConfig, tmp_path: Path) -> None:
    with Profiling(config, device=CPU) as run:
        for _ in range(4):
            run.step()
    assert list(tmp_path.iterdir()) == []


def test_trace_of_the_steps_of_the_run(config: JobConfig, tmp_path: Path) -> None:
    config.profiling.enable_profiling = True
    config.profiling.save_traces_folder = "traces"
    with Profiling(config, device=CPU, rank=2, start_step=30) as profiler:
        for _ in range(3):
            torch.ones(8, 8) @ torch.ones(8, 8)
            profiler.step()
    (path,) = tmp_path.rglob("*.json")
    assert str(path.relative_to(tmp_path)) == "traces/iteration_33/rank2_trace.json"
    names = [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]
    assert names.count("aten::mm") == 1  # one step of three


def test_without_cuda_there_are_no_snapshots(config: JobConfig, caplog) -> None:
    config.profiling.enable_memory_snapshot = True
    with Profiling(config, device=CPU) as memory:
        memory.step()
    assert [record.getMessage()[:19] for record in caplog.records] == ["no memory snapshots"]


def test_snapshots_every_freq_steps_and_when_memory_runs_out(
    config: JobConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = []
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda **kwargs: recording.append(kwargs)
    )
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"segments": []})
    config.profiling.enable_memory_snapshot = True
    with (
        pytest.raises(torch.OutOfMemoryError),
        Profiling(config, device=torch.device("cuda")) as memory,
    ):
        for _ in range(4):
            memory.step()
        raise torch.OutOfMemoryError("no more")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.pickle")) == [
        "memory_snapshot/iteration_3/rank0_memory_snapshot.pickle",
        "memory_snapshot/iteration_4_exit/rank0_memory_snapshot.pickle",
    ]
    assert recording == [{"max_entries": profiling.SNAPSHOT_MAX_ENTRIES}, {"enabled": None}]
