"""`scripts/benchmark.py` at small sizes: `loss`, `heads` and its peers, `speed`, all that `gpu`
runs."""

from __future__ import annotations

import copy
import gzip
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import benchmark as program
import pytest
import torch
from benchmarks.gpu import measure_part
from benchmarks.gpu_plan import Case, Part, all_parts, with_overheads
from benchmarks.measure import in_process
from benchmarks.report import report

from formats_run import SEQUENTIAL, SMALL, write_run
from torchtitan_mtp.config import parse_args
from torchtitan_mtp.errors import UserError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs the program with these arguments, in this process; what it prints."""

    def run(*arguments: str) -> str:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["scripts/benchmark.py", *arguments])
        program.main()
        return capsys.readouterr().out

    return run


def test_loss_beside_a_naive_one_and_the_limit(
    benchmark: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "loss.json"
    sizes = ["--sizes", "1024x16x8192", "--heads", "2", "--ops", "chunked", "naive"]
    printed = benchmark("loss", *sizes, "--rounds", "1", "--repeats", "1", "--json", str(out))
    result = json.loads(out.read_text())
    rows = {row["op"]: row for row in result["rows"]}
    assert list(rows) == ["chunked", "naive", "limit"]
    assert printed.count("\n| 1024x16x8192 |") == 3
    assert "scripts/benchmark.py loss --sizes 1024x16x8192" in result["command"]
    assert result["torch"] and result["device"] and result["date"]
    # 512 rows of logits are 16 MiB; whole logits of a head 32 MiB, and naive holds some of them.
    assert rows["limit"]["peak_mib"] < rows["chunked"]["peak_mib"] < rows["naive"]["peak_mib"]
    assert rows["limit"]["cpu_s"] < rows["chunked"]["cpu_s"]


@pytest.mark.slow
def test_heads_beside_held_logits(benchmark: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "heads.json"
    sizes = ["--layers", "2", "--dim", "64", "--vocab", "8192", "--seq-len", "1024"]
    cases = ["--cases", "parallel, head by head", "logits held"]
    rounds = ["--rounds", "1", "--repeats", "1"]
    files = ["--json", str(out), "--plot", str(tmp_path / "new" / "heads.png")]
    printed = benchmark("heads", "--heads", "1", "4", *sizes, *cases, *rounds, *files)
    assert (tmp_path / "new" / "heads.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads(out.read_text())
    rows = {row["case"]: row for row in result["rows"]}
    assert [row["n"] for row in result["rows"]] == [1, 4, 4, 4]
    # Two blocks and `output` of 64 x 8192; each further head is a block and `output`.
    block = 4 * 64 * 64 + 3 * 64 * 256 + 1024 * 64
    flops = (5 * block + 4 * 64 * 8192) / (2 * block + 64 * 8192)
    for case in ("parallel, head by head", "logits held"):
        assert rows[case]["FLOPs / n=1"] == pytest.approx(flops, rel=1e-6)
    # One head's logits are 32 MiB: held, each with its softmax; ours has 16 MiB at a time.
    assert rows["logits held"]["more MiB"] > 4 * 32
    assert rows["parallel, head by head"]["peak / n=1"] < 1.2
    assert "| limit: measured matmul rate | 4 |" in printed


@pytest.mark.slow
def test_speed_is_tokens_over_the_rate_of_products(
    benchmark: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "speed.json"
    sizes = ["--layers", "2", "--dim", "64", "--n-heads", "4", "--vocab", "64", "--seq-len", "32"]
    sizes += ["--batch-size", "2", "--matmul", "64", "--steps", "2", "--warmup", "1"]
    printed = benchmark("speed", "--dtype", "bfloat16", *sizes, "--json", str(out))
    result = json.loads(out.read_text())
    assert [row["mode"] for row in result["rows"]] == ["eager", "compiled"]
    for row in result["rows"]:
        rate = row["GFLOP/s of 64^3"]
        assert (row["dtype"], row["n"]) == ("bfloat16", 1) and rate > 0
        assert row["tokens/s"] == pytest.approx(2 * 32 / row["s a step"])
        assert row["tokens/s per GFLOP/s"] == pytest.approx(row["tokens/s"] / rate)
        assert f"| {row['mode']} | bfloat16 | 1 |" in printed


@pytest.mark.slow
def test_decode_holds_the_gain_against_the_arithmetic(
    benchmark: Callable[..., str], tmp_path: Path
) -> None:
    write_run(tmp_path / "run", **SMALL | SEQUENTIAL)
    out = tmp_path / "decode.json"
    options = ["--max-new-tokens", "30", "--repeats", "1", "--modes", "eager", "--drafts", "1", "2"]
    benchmark("decode", "--checkpoint", str(tmp_path / "run"), *options, "--json", str(out))
    block, output = (2 * 32 + 2 * 16) * 32 + 3 * 32 * 48, 320 * 32
    trunk, module = 3 * block + output, block + 2 * 32 * 32 + output
    for drafts, row in enumerate(json.loads(out.read_text())["rows"], start=1):
        assert (row["heads"], row["L"], row["drafts"]) == ("sequential", 3, drafts)
        assert 1 <= row["tokens/step"] <= 1 + drafts
        assert row["bound"] == pytest.approx(row["tokens/step"] * 3 / (3 + drafts))
        gain = row["speculative tokens/s"] / row["plain tokens/s"]
        assert row["speed-up"] == pytest.approx(gain)
        share = trunk / (trunk + drafts * module)
        limit = row["tokens/step"] * share / row["d + 1 tokens / 1"]
        assert row["limit"] == pytest.approx(limit) and limit > 0
    assert drafts == 2


def test_gpu_refuses_a_cpu(benchmark: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # one that is there
    with pytest.raises(SystemExit) as stopped:
        benchmark("gpu")
    assert str(stopped.value).startswith("error: benchmark gpu: found no CUDA device")
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize("name", ["file/a.json", "file/a.png", "a.bad"])
def test_what_cant_be_written_is_one_line_below_the_table(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    out, is_json = tmp_path / name, name.endswith(".json")
    with pytest.raises(UserError, match=f"{out}: can't be written"):
        report([{"case": "a", "s": 1.5}], out if is_json else None, None if is_json else out, ["s"])
    assert "| a | 1.5 |" in capsys.readouterr().out


@pytest.mark.slow
def test_gpu_runs_small(benchmark: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    benchmark("gpu", "--small", "--json", str(out))
    parts = {name: part["rows"] for name, part in json.loads(out.read_text())["parts"].items()}
    assert list(parts) == [
        *("products", "attention", "loss", "training", "TorchTitan", "decoding", "a step")
    ]
    assert not [row for rows in parts.values() for row in rows if "error" in row]
    roof, chunked = parts["loss"]
    assert chunked["time / products"] == pytest.approx(chunked["wall_s"] / roof["wall_s"])
    plain, float8 = parts["training"]
    assert (plain["n"], plain["float8"], float8["n"], float8["float8"]) == (1, "", 2, "tensorwise")
    assert "% a head" not in float8  # its model has no row with n = 1
    # By TorchTitan: 6 a parameter but the embedding's, 12 L H hd S of attention; 4 layers of 128.
    block = 4 * 128 * 128 + 3 * 128 * 384 + 2 * 128
    flops = 6 * (4 * block + 128 + 320 * 128) + 12 * 4 * 128 * 64
    assert parts["TorchTitan"][0]["GFLOP/token, its count"] == pytest.approx(flops / 1e9)
    ranges = {row["name"] for row in parts["a step"] if row["what"] == "range"}
    assert {"trunk", "head 1", "head 2", "loss 1", "loss 2", "backward of the trunk"} <= ranges
    with gzip.open(tmp_path / "gpu.trace.json.gz") as trace:
        assert {"head 2", "trunk"} < {event["name"] for event in json.load(trace)["traceEvents"]}
    page = benchmark("page", str(out))
    for name, rows in parts.items():
        table = page.partition(f"**{name[0].upper()}{name[1:]}**")[2].split("\n\n")[1]
        assert table.strip().count("\n") == len(rows) + 1


def test_what_a_gpu_trains_is_a_configuration_each(tmp_path: Path) -> None:
    parts = all_parts(tmp_path / "trace.json.gz", small=False)
    assert sum(part.limit for part in parts.values()) < 8 * 60
    found = set()
    for case in parts["training"].cases:
        config = parse_args(case.args[0])
        assert config.training.mixed_precision_param == "bfloat16" and config.compile.enable
        float8 = "quantize.linear.float8" in config.model.converters
        recipe = config.quantize.linear.float8.recipe_name if float8 else None
        found.add((config.model.flavor, config.num_future_tokens, config.mtp.heads, recipe))
        found.add((config.model.flavor, config.num_future_tokens, config.mtp.engine))
    for flavor in ("1B", "8B"):
        assert {(flavor, n, "head_by_head") for n in (1, 2, 4)} < found
        assert (flavor, 4, "joint") in found and (flavor, 2, "sequential", None) in found
    assert {
        ("8B", n, "parallel", name) for n in (1, 4) for name in ("tensorwise", "rowwise")
    } < found


def test_overheads_are_shares_of_a_step_without_heads() -> None:
    rows = [
        {"model": "1B", "n": 4, "float8": "", "tokens/s": 50.0},
        {"model": "1B", "n": 1, "float8": "", "tokens/s": 80.0},
        {"model": "1B", "n": 2, "float8": "rowwise", "tokens/s": 50.0},
        {"model": "1B", "error": "TimeoutError"},
    ]
    assert with_overheads(rows)[0]["% a head"] == pytest.approx(20)  # 1.6 times as long, 3 heads
    assert [row for row in rows if "% a head" in row] == rows[:1]


def test_a_case_that_fails_dies_or_does_not_end_is_passed_over() -> None:
    part = Part(
        3,
        [
            Case({"what": "raises"}, float, ("x",)),
            Case({"what": "dies"}, os._exit, (3,)),
            Case({"what": "is well"}, copy.copy, ([{"figure": 1}, {"figure": 2}],)),
            Case({"what": "hangs"}, time.sleep, (600,)),
            Case({"what": "comes late"}, copy.copy, ([],)),
        ],
    )
    in_process(int)  # the server of processes runs
    raised, died, one, two, hung, late = measure_part(part, time.perf_counter() + 3)
    assert raised == {
        "what": "raises",
        "error": "ValueError: could not convert string to float: 'x'",
    }
    assert died["error"] == "RuntimeError: its process died, exit code 3"
    assert (one, two) == ({"what": "is well", "figure": 1}, {"what": "is well", "figure": 2})
    assert hung["error"].startswith("TimeoutError: ended after its limit of ")
    assert late["error"] == "TimeoutError: left out: the time of its part is over"
