"""scripts/estimate.py: a line through few layers and micro-batches is what all of them take."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import estimate
import pytest
from benchmarks.devices import device_named
from benchmarks.measure import in_process
from benchmarks.stages import bubble
from benchmarks.step import Step, count_step, run_step
from benchmarks.streams import Rates

from torchtitan_mtp.config import JobConfig, parse_args
from torchtitan_mtp.distributed.memory import GIB
from torchtitan_mtp.distributed.mesh import Degrees
from torchtitan_mtp.errors import UserError

RANKS, LAYERS = 4, 7
SMALL = """
--model.converters mtp --mtp.num_future_tokens 2 --model.vocab_size 512
--training.seq_len 64 --validation.seq_len 64 --training.local_batch_size 1
--activation_checkpoint.mode full --compile.enable false --checkpoint.enable false
"""
DEEPSEEK = SMALL + "--model.name deepseek_v3 --model.flavor quickstart --mtp.heads sequential"
TWO_LAYERS = (
    SMALL
    + """
--model.name llama3 --model.flavor custom --model.args.n_layers 2 --model.args.dim 32
--model.args.n_heads 4
"""
)


def both_ways(options: str, micro_batches: int, stage: int) -> list[Step]:
    config, rates = parse_args(options.split()), Rates(link=1e9)
    line = run_step(config, RANKS, "gpu", rates, micro_batches, stage)
    return [line, count_step(config, RANKS, micro_batches, "gpu", rates, stage)]


def check_a_line_is_the_whole_step(options: str, micro_batches: int, stage: int = 0) -> None:
    line, whole = in_process(both_ways, options, micro_batches, stage)
    assert line.peak == whole.peak
    assert (line.calls, line.bytes, line.flops) == (whole.calls, whole.bytes, whole.flops)
    assert line.seconds == pytest.approx(whole.seconds, rel=1e-3)
    found: Any = line.waits
    assert found == pytest.approx(whole.waits, rel=1e-2)


def test_a_line_through_few_micro_batches_is_the_whole_step() -> None:
    check_a_line_is_the_whole_step(TWO_LAYERS, 4)


@pytest.mark.exhaustive
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_line_through_few_layers_is_the_whole_step(micro_batches: int) -> None:
    options = f"{DEEPSEEK} --model.args.n_layers {LAYERS}"
    check_a_line_is_the_whole_step(options, micro_batches)


@pytest.mark.parametrize(
    ("stage", "micro_batches"),
    [(0, 7), *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in [(0, 4), (3, 7)])],
)
def test_a_line_through_few_micro_batches_in_flight_is_the_whole_step(
    stage: int, micro_batches: int
) -> None:
    """The first of four stages has four in flight, the last one one."""
    options = TWO_LAYERS + "--model.args.n_layers 4 --parallelism.pipeline_parallel_degree 4"
    check_a_line_is_the_whole_step(options, micro_batches, stage)


def test_a_bubble_is_the_way_there_and_back() -> None:
    """Of 4 ranks and 3 seconds: 3 times 3, whatever a rank's stages are."""
    assert bubble("1F1B", 4, 3.0) == bubble("Interleaved1F1B", 4, 3.0) == 9.0
    assert bubble("InterleavedZeroBubble", 4, 3.0) == 0.0


LLAMA = "--job.config_file debug_parallel.toml --training.global_batch_size 64"


def test_layouts_are_those_that_the_checks_admit() -> None:
    config = parse_args(LLAMA.split())
    found = [degrees for _, degrees in estimate.possible_layouts(config, 8)]
    assert found[0] == Degrees(dp_shard=8)
    assert all(degrees.ranks == 8 for degrees in found) and len(set(found)) == len(found)
    assert Degrees(dp_replicate=2, dp_shard=2, cp=2) in found
    config.training.seq_len = config.validation.seq_len = 4  # two chunks of a token on two ranks
    assert {degrees.cp for _, degrees in estimate.possible_layouts(config, 8)} == {1, 2}


def test_layouts_share_experts_that_there_are_and_split_tensors_within_a_machine() -> None:
    config = parse_args(LLAMA.split())
    found = [degrees for _, degrees in estimate.possible_layouts(config, 8, machine=2)]
    assert {degrees.ep for degrees in found} == {1} and {degrees.tp for degrees in found} == {1, 2}
    config = parse_args(DEEPSEEK.split())  # of 16 experts
    found = [degrees for _, degrees in estimate.possible_layouts(config, 32, machine=1)]
    assert {degrees.ep for degrees in found} == {1, 2, 4, 8, 16}


def test_the_fastest_layout_that_fits_is_the_first_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of half the tokens takes 0.4 s by cp, and replicas have no room; tp is refused."""

    def step_of(job: JobConfig, *_: Any) -> Step:
        degrees = job.parallelism
        if degrees.tensor_parallel_degree > 1:
            raise UserError("the heads can't be split")
        gib = 70 if degrees.data_parallel_replicate_degree > 1 else 30
        seconds = 0.4 if degrees.context_parallel_degree > 1 else 1.0
        return Step({"early": Counter(parameters=gib * GIB)}, seconds=seconds)

    monkeypatch.setattr(estimate, "run_layout", step_of)
    config, h100 = parse_args(TWO_LAYERS.split()), device_named("h100")  # of 79.6 GiB
    rows = estimate.try_layouts(config, 2, Rates(link=1e9), h100, most=3)
    assert [(row["layout"], row["fits"]) for row in rows] == [
        ("cp=2", True),
        ("dp_shard=2", True),
        ("dp_replicate=2", False),
    ]
    assert [row["tokens/s a rank"] for row in rows] == [32 / 0.4, 64, 64]


def test_a_recipe_that_no_layout_can_follow_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Step:
        raise UserError("not followed yet")

    monkeypatch.setattr(estimate, "run_layout", refuse)
    config, h100 = parse_args(TWO_LAYERS.split()), device_named("h100")
    with pytest.raises(UserError, match="not followed yet"):
        estimate.try_layouts(config, 2, Rates(link=1e9), h100, most=3)


def test_a_table_of_a_step() -> None:
    """Llama's debugmodel: 256 tokens on each of 4 ranks, in one second of 4 TFLOP/s."""
    config, key = parse_args(LLAMA.split()), ("fsdp", "all-gather")
    memory = {"early": Counter(parameters=3 * GIB, loss=GIB), "late": Counter(parameters=3 * GIB)}
    step = Step(memory, Counter({key: 2}), Counter({key: GIB}), 10**12, 1.0, Counter({key: 0.25}))
    device = device_named("h100")
    found = estimate.figures(config, 4, step, device, 4e12)
    assert found["memory of a rank"][-2:] == [
        {"alive at the peak": "all", "GiB": 4.0},
        {"alive at the peak": "a device has", "GiB": 79.6},
    ]
    assert found["collectives of a step"] == [
        {
            "dimension": "fsdp",
            "collective": "all-gather",
            "calls": 2,
            "GiB": 1.0,
            "waited for, ms": 250.0,
        }
    ]
    time = {row["of a rank"]: row[""] for row in found["time of a step"]}
    assert time["tokens"] == time["tokens/s"] == 64 * 128 / 4
    assert time["MFU, %"] == pytest.approx(100 * time["TFLOPs that the model needs"] / 4)


def test_what_is_wrong_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match='--device h1: expected "cpu" or one of a100, h100'):
        in_process(device_named, "h1")
    assert "Traceback" not in capfd.readouterr().err
    with pytest.raises(UserError, match="--machine 0: expected a positive number"):
        estimate.run("debug_parallel.toml", machine=0)
    with pytest.raises(UserError, match=r"--json no/where\.json: can't be written: No such file"):
        estimate.run("debug_parallel.toml", device="no device", json=Path("no/where.json"))


def test_an_offloaded_optimizer_is_refused_by_name() -> None:
    config = parse_args([*TWO_LAYERS.split(), "--training.enable_cpu_offload", "true"])
    with pytest.raises(UserError, match=r"training\.enable_cpu_offload = true: fake"):
        run_step(config, RANKS)
