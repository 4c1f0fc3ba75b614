"""What MetricsProcessor writes and prints, read back."""

import itertools
import logging
import re
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.inference.acceptance import Acceptance
from torchtitan_mtp.monitoring import backends
from torchtitan_mtp.monitoring.backends import metrics_folder
from torchtitan_mtp.monitoring.losses import HeadLosses
from torchtitan_mtp.monitoring.metrics import MetricsProcessor, acceptance_metrics

CPU = torch.device("cpu")
TORCHTITAN_TAGS = {
    "loss_metrics/global_avg_loss",
    "loss_metrics/global_max_loss",
    "grad_norm",
    "lr",
    "n_tokens_seen",
    "throughput(tps)",
    "tflops",
    "mfu(%)",
    "time_metrics/end_to_end(s)",
    "time_metrics/data_loading(s)",
    "time_metrics/data_loading(%)",
    "memory/max_active(GiB)",
    "memory/max_active(%)",
    "memory/max_reserved(GiB)",
    "memory/max_reserved(%)",
    "memory/num_alloc_retries",
    "memory/num_ooms",
}
OUR_TAGS = {
    "loss_metrics/global_total_loss",
    *(f"loss_metrics/mtp_head_{k}_{what}" for k in (1, 2, 3) for what in ("loss", "accuracy")),
    *(f"mtp/head_{k}_scale" for k in (1, 2, 3)),
}
HEADS = HeadLosses(
    losses=[2.5, 3.0, 3.5],
    accuracies=[0.5, 0.25, 0.125],
    targets=[64, 62, 60],
    total=9.0,
    max_loss=2.75,
)
ONE_HEAD = HeadLosses([2.0], [0.5], [64], total=2.0, max_loss=2.0)
SCALES = {f"mtp/head_{k}_scale": scale for k, scale in enumerate([1.0, 0.5, 0.25], 1)}
OTHERS = {"grad_norm": 1.5, "lr": 0.001, **SCALES}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def config(tmp_path: Path) -> JobConfig:
    config = JobConfig()
    config.job.dump_folder = str(tmp_path)
    config.metrics.enable_tensorboard = True
    config.metrics.log_freq = 10
    config.training.steps = 25
    return config


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The package's log, whether or not an earlier test has set it up not to propagate."""
    logger = logging.getLogger("torchtitan_mtp")
    level = logger.level
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)


def processor(config: JobConfig, clock: Clock, **options: object) -> MetricsProcessor:
    defaults = dict(device=CPU, flops_per_token=1e6, peak_flops=1e9, clock=clock)
    return MetricsProcessor(config, **{**defaults, **options})  # type: ignore[arg-type]


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    (file,) = folder.rglob("events.*")
    events = EventAccumulator(str(file)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tags_and_values_in_the_event_file(config: JobConfig, clock: Clock, tmp_path: Path) -> None:
    metrics = processor(config, clock)
    for _ in range(10):
        metrics.record_step(tokens=100, data_seconds=0.05)
    clock.now += 2.0
    metrics.log(10, HEADS, {**OTHERS, "n_tokens_seen": 1000})
    metrics.close()
    events = read_events(tmp_path)
    assert set(events) == TORCHTITAN_TAGS | OUR_TAGS
    expected = {
        "loss_metrics/global_avg_loss": 2.5,
        "loss_metrics/global_max_loss": 2.75,
        "loss_metrics/global_total_loss": 9.0,
        "loss_metrics/mtp_head_1_loss": 2.5,
        "loss_metrics/mtp_head_3_loss": 3.5,
        "loss_metrics/mtp_head_2_accuracy": 0.25,
        "mtp/head_3_scale": 0.25,
        "throughput(tps)": 500.0,  # 1000 tokens in 2 s
        "tflops": 500.0 * 1e6 / 1e12,
        "mfu(%)": 50.0,  # 500 tokens/s * 1e6 FLOPs of 1e9 FLOP/s
        "time_metrics/end_to_end(s)": 0.2,
        "time_metrics/data_loading(s)": 0.05,
        "time_metrics/data_loading(%)": 25.0,
        "n_tokens_seen": 1000.0,
    }
    for tag, value in expected.items():
        assert events[tag] == [(10, pytest.approx(value))], tag
    assert 0 < events["memory/max_reserved(GiB)"][0][1] < 1000
    assert 0 < events["memory/max_reserved(%)"][0][1] < 100


def test_losses_against_the_trunk_have_tags_of_their_own(
    config: JobConfig, clock: Clock, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    """A divergence under the name of a cross-entropy would be compared with one."""
    config.model.converters = ["mtp"]
    config.mtp.num_future_tokens, config.mtp.target, config.mtp.target_loss = 3, "trunk", "tv"
    metrics = processor(config, clock)
    metrics.log(10, HEADS, {**OTHERS, "n_tokens_seen": 1000})
    metrics.close()
    events = read_events(tmp_path)
    renamed = {f"loss_metrics/mtp_head_{k}_loss": f"loss_metrics/mtp_head_{k}_tv" for k in (2, 3)}
    assert set(events) == TORCHTITAN_TAGS | {renamed.get(tag, tag) for tag in OUR_TAGS}
    assert events["loss_metrics/mtp_head_3_tv"] == [(10, 3.5)]
    assert "heads 2-3 (tv): 3.0000 3.5000" in log.text


def test_first_interval_counts_its_one_step(
    config: JobConfig, clock: Clock, tmp_path: Path
) -> None:
    metrics = processor(config, clock, world_size=4)
    for step in range(1, 11):
        metrics.record_step(tokens=800, data_seconds=0.0)
        clock.now += 2.0 if step == 1 else 1.0
        if metrics.should_log(step):
            metrics.log(step, HEADS, {**OTHERS, "n_tokens_seen": 800 * step})
    metrics.close()
    events = read_events(tmp_path)
    assert events["time_metrics/end_to_end(s)"] == [(1, 2.0), (10, 1.0)]
    assert events["throughput(tps)"] == [(1, 100.0), (10, 200.0)]  # a device: a fourth of all


def test_steps_to_log(config: JobConfig, clock: Clock) -> None:
    config.metrics.enable_tensorboard = False
    metrics = processor(config, clock)
    assert [step for step in range(1, 26) if metrics.should_log(step)] == [1, 10, 20, 25]


def test_validation_tags_and_its_time_outside_of_training(
    config: JobConfig, clock: Clock, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    metrics = processor(config, clock)
    metrics.record_step(tokens=1000, data_seconds=0.0)
    clock.now += 1.0
    clock.now += 30.0  # validation
    metrics.log_validation(
        5,
        HeadLosses([2.0, 2.5, 3.0], [0.5, 0.25, 0.125], [64, 62, 60], total=3.0, max_loss=2.1),
        Acceptance([100, 80], [60, 32], [100, 50], [60, 25]),
        tokens=600,
        elapsed=30.0,
    )
    assert log.messages[-1] == (
        "validate step:  5  loss:  2.0000  heads 2-3: 2.5000 3.0000  accuracy: 50.0% 25.0% 12.5%  "
        "acceptance: 60.0% 40.0%  tokens/step: 1.90  tps: 20"
    )
    metrics.log(6, HEADS, {**OTHERS, "n_tokens_seen": 1000})
    metrics.close()
    events = read_events(tmp_path)
    assert events["throughput(tps)"] == [(6, 1000.0)]
    validation = {tag: v[0][1] for tag, v in events.items() if tag.startswith("validation_")}
    memory = {tag for tag in validation if "memory" in tag}
    assert memory == {
        f"validation_metrics/memory/max_{what}({unit})"
        for what in ("active", "reserved")
        for unit in ("GiB", "%")
    }
    assert {tag: value for tag, value in validation.items() if tag not in memory} == {
        "validation_metrics/loss": 2.0,
        "validation_metrics/throughput(tps)": 20.0,
        "validation_metrics/mtp_head_1_loss": 2.0,
        "validation_metrics/mtp_head_2_loss": 2.5,
        "validation_metrics/mtp_head_3_loss": 3.0,
        "validation_metrics/mtp_head_1_accuracy": 0.5,
        "validation_metrics/mtp_head_2_accuracy": 0.25,
        "validation_metrics/mtp_head_3_accuracy": 0.125,
        "validation_metrics/mtp_head_2_acceptance": pytest.approx(0.6),
        "validation_metrics/mtp_head_3_acceptance": pytest.approx(0.4),
        "validation_metrics/tokens_per_step": pytest.approx(1.9),  # 1 + 0.6 + 0.6 * 0.5
    }


def test_heads_that_were_not_compared_have_no_acceptance() -> None:
    assert acceptance_metrics(Acceptance([], [], [], [])) == {}
    tags = acceptance_metrics(Acceptance([4, 0], [1, 0], [4, 0], [1, 0]))
    assert tags == {"mtp_head_2_acceptance": 0.25}


def test_validation_of_a_plain_model_names_no_acceptance(
    config: JobConfig, clock: Clock, log: pytest.LogCaptureFixture
) -> None:
    metrics = processor(config, clock)
    metrics.log_validation(
        5,
        ONE_HEAD,
        Acceptance([], [], [], []),
        tokens=600,
        elapsed=30.0,
    )
    assert log.messages[-1] == "validate step:  5  loss:  2.0000  accuracy: 50.0%  tps: 20"


def test_without_a_peak_there_is_no_mfu(
    config: JobConfig, clock: Clock, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    metrics = processor(config, clock, peak_flops=None)
    metrics.record_step(tokens=1, data_seconds=0.0)
    clock.now += 1
    metrics.log(1, HEADS, {**OTHERS, "n_tokens_seen": 1})
    metrics.close()
    assert set(read_events(tmp_path)) == (TORCHTITAN_TAGS | OUR_TAGS) - {"mfu(%)"}
    assert "mfu" not in log.messages[-1] and "tflops: 0.00" in log.messages[-1]


def test_console_line_is_plain_and_complete(
    config: JobConfig, clock: Clock, log: pytest.LogCaptureFixture
) -> None:
    metrics = processor(config, clock)
    for _ in range(10):
        metrics.record_step(tokens=100, data_seconds=0.05)
    clock.now += 2.0
    metrics.log(10, HEADS, {**OTHERS, "n_tokens_seen": 1000})
    metrics.close()
    line = re.sub(r"memory: +[\d.]+GiB\([\d.]+%\)", "memory: M", log.messages[-1])
    assert line == (
        "step: 10  loss:  2.5000  heads 2-3: 3.0000 3.5000  grad_norm:  1.5000  memory: M  "
        "tps: 500  mfu: 50.00%  data: 25.0%  eta: -"
    )


def test_console_line_of_a_plain_model_names_no_heads(
    config: JobConfig, clock: Clock, log: pytest.LogCaptureFixture
) -> None:
    metrics = processor(config, clock)
    metrics.log(1, ONE_HEAD, OTHERS)
    metrics.close()
    assert "head" not in log.messages[-1]


def test_colours_only_on_a_terminal_that_wants_them(
    config: JobConfig,
    clock: Clock,
    log: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for disabled in (False, True):
        config.metrics.disable_color_printing = disabled
        metrics = processor(config, clock, rank=1)  # no progress bar on rank 1
        metrics.log(1, HEADS, {**OTHERS, "n_tokens_seen": 1})
        assert ("\033[" in log.messages[-1]) is not disabled


def test_folder_is_the_start_and_rank_0_writes_alone(
    config: JobConfig, clock: Clock, tmp_path: Path
) -> None:
    config.metrics.save_tb_folder = "events"
    for rank in (0, 1):
        processor(config, clock, rank=rank, world_size=2).close()
    (file,) = (f for f in tmp_path.rglob("*") if f.is_file())
    assert re.fullmatch(r"events/\d{8}-\d{6}/events\..*", str(file.relative_to(tmp_path)))


def test_all_ranks_write_when_asked(config: JobConfig, clock: Clock, tmp_path: Path) -> None:
    config.metrics.save_for_all_ranks = True
    for rank in (0, 1):
        processor(config, clock, rank=rank, world_size=2).close()
    folders = {f.parent.name for f in tmp_path.rglob("events.*")}
    assert folders == {"rank_0", "rank_1"}


def test_all_ranks_share_the_start_of_rank_0(
    config: JobConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(values: list[str], value: str, group: None) -> None:
        values[:] = ["20250102-030405", value]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    config.job.dump_folder = "out"
    config.metrics.save_for_all_ranks = True
    assert metrics_folder(config, rank=1) == "out/tb/20250102-030405/rank_1"


def test_starts_within_one_minute_have_folders_of_their_own(
    config: JobConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = iter([datetime(2025, 1, 2, 3, 4, 5), datetime(2025, 1, 2, 3, 4, 50)])
    monkeypatch.setattr(backends, "datetime", SimpleNamespace(now=lambda: next(starts)))
    first, second = (metrics_folder(config, rank=0) for _ in range(2))
    assert first.endswith("/tb/20250102-030405") and second.endswith("/tb/20250102-030450")


def test_wandb_gets_the_config_and_the_same_tags(
    config: JobConfig, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = SimpleNamespace(logged={}, closed=False)
    run.log = lambda metrics, step: run.logged.update({step: metrics})
    run.finish = lambda: setattr(run, "closed", True)
    started: dict[str, Any] = {}
    wandb = SimpleNamespace(init=lambda **kwargs: started.update(kwargs) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config.metrics.enable_tensorboard, config.metrics.enable_wandb = False, True
    metrics = processor(config, clock)
    metrics.log(1, HEADS, {**OTHERS, "n_tokens_seen": 1})
    metrics.close()
    assert started["config"]["training"]["steps"] == 25
    assert set(run.logged[1]) == TORCHTITAN_TAGS | OUR_TAGS and run.closed


def test_nothing_is_written_by_default(config: JobConfig, clock: Clock, tmp_path: Path) -> None:
    config.metrics.enable_tensorboard = False
    processor(config, clock).close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "module", "package"),
    [
        ("enable_wandb", "wandb", "wandb"),
        ("enable_tensorboard", "torch.utils.tensorboard", "tensorboard"),
    ],
)
def test_a_missing_package_is_named(
    config: JobConfig,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    module: str,
    package: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # import fails
    config.metrics.enable_tensorboard = False
    setattr(config.metrics, key, True)
    with pytest.raises(UserError, match=f"metrics.{key} = true: .*pip install {package}"):
        processor(config, clock)


@pytest.mark.parametrize("slow", [1, 30, 1000])
def test_time_left_does_not_jump(
    slow: int, config: JobConfig, clock: Clock, log: pytest.LogCaptureFixture
) -> None:
    """Of steps of 1 s, after a first one of 5 minutes, and now and then `slow` times as long."""
    config.training.steps = 4000
    metrics = processor(config, clock)
    left = {}
    for step in range(1, 401):
        clock.now += 300 if step == 1 else slow if step % 97 < 12 else 1
        metrics.record_step(tokens=1, data_seconds=0.0)
        if metrics.should_log(step):
            metrics.log(step, HEADS, {**OTHERS, "n_tokens_seen": step})
            left[step] = log.messages[-1].split("eta: ")[1]
        if step == 4:  # validation; it is not training's time
            clock.now += 500
            metrics.log_validation(
                step,
                ONE_HEAD,
                Acceptance([], [], [], []),
                tokens=600,
                elapsed=500.0,
            )
    assert left.pop(1) == "-"  # nothing is known yet
    if slow == 1:
        assert left[10] == "1:06:30" and left[400] == "1:00:00"  # 3990 and 3600 s
    seconds = []
    for text in left.values():
        days, _, clock_time = text.rpartition(", ")
        hours, minutes, rest = map(int, clock_time.split(":"))
        seconds.append(int(days.split()[0] if days else 0) * 86400 + hours * 3600)
        seconds[-1] += minutes * 60 + rest
    for before, now in itertools.pairwise(seconds):
        assert before / 2.1 < now < 2.1 * before
