"""`benchmark.py gpu`: everything that one GPU has to tell, in under eight minutes."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import gemm, heads, loss
from benchmarks.report import Rows, markdown, write_json
from benchmarks.train import measure_training
from torchtitan_mtp.errors import UserError

GEMM_DTYPES = ("float32", "bfloat16", "float8_e4m3fn")
OURS = ("parallel, joint", "parallel, head by head", "chain")
OTHERS = ("parallel, head by head", "logits held", "logits checkpointed")
MTP = ["--model.converters", "mtp", "--mtp.num_future_tokens", "4"]
FLOAT8 = ["--model.converters", "mtp,quantize.linear.float8", "--mtp.num_future_tokens", "4"]


def run(json: Path = Path("gpu.json"), parts: tuple[str, ...] = (), small: bool = False) -> None:
    """The GPU set on one GPU of at least 80 GB; one JSON file, written after every part.

    A part that fails is noted with its error, and the others go on.

    Args:
        json: file for the figures.
        parts: the parts to run, by name and in this order; all of them where none is named.
        small: sizes for a machine without a GPU, which show that it runs and nothing else.
    """
    if not torch.cuda.is_available() and not small:
        raise UserError(
            "benchmark gpu: found no CUDA device, expected one with at least 80 GB; run it on such "
            "a machine, or with --small to try the program on this CPU"
        )
    results: dict[str, Any] = {}
    known = _small_parts() if small else _parts()
    if unknown := [name for name in parts if name not in known]:
        raise UserError(f"benchmark gpu: no part {unknown[0]!r}; there are {', '.join(known)}")
    for name in parts or known:
        start = time.perf_counter()
        try:
            rows = known[name]()
        except Exception as error:
            rows = [{"error": f"{type(error).__name__}: {error}"}]
        seconds = time.perf_counter() - start
        print(f"\n{name} ({seconds:.0f} s)\n{markdown(rows)}", flush=True)
        results[name] = {"seconds": seconds, "rows": rows}
        write_json(json, results)
    print(f"wrote {json}")


def _loss_ops() -> tuple[str, ...]:
    """The loss ops whose libraries are installed."""
    ops = ["chunked", "chunked_compiled", "chunked_compiled_bf16"]
    if importlib.util.find_spec("triton"):
        ops += ["chunked_triton", "chunked_triton_bf16"]
    ops += ["titan_chunked", "naive_compiled"]
    if hasattr(F, "linear_cross_entropy"):
        ops.append("torch")
    for name, module in (("liger", "liger_kernel"), ("cce", "cut_cross_entropy")):
        if importlib.util.find_spec(module):
            ops.append(name)
    return tuple(ops)


def _training(name: str, options: list[str], layers: int | None, steps: int, warmup: int) -> Rows:
    """One row; the data is this Python's library, the tokens are bytes."""
    return [measure_training(name, options, layers, steps, warmup)]


def _parts() -> dict[str, Callable[[], Rows]]:
    shape = {"n": 1, "n_rows": 8192, "dim": 4096, "vocab": 128256, "dtype": "bfloat16"}
    model = {"layers": 8, "dim": 2048, "vocab": 128256, "seq_len": 4096, "batch_size": 1}
    model |= {"ac": "none", "dtype": "bfloat16"}
    common = ["--model.name", "llama3", "--training.seq_len", "4096", "--compile.enable", "true"]
    common += ["--training.mixed_precision_param", "bfloat16"]
    common += ["--activation_checkpoint.mode", "selective"]
    common += ["--activation_checkpoint.selective_ac_option", "op"]
    one = [*common, *MTP, "--model.flavor", "1B", "--training.local_batch_size", "4"]
    eight = [*common, "--model.flavor", "8B", "--training.local_batch_size", "2"]
    joint = ["--mtp.engine", "joint"]
    return {
        "gemm": lambda: gemm.table(None, GEMM_DTYPES),
        "loss": lambda: loss.compare(shape, _loss_ops(), 3, 1),
        "loss of 4 heads": lambda: loss.compare(shape | {"n": 4}, ("chunked",), 3, 1),
        "heads": lambda: heads.table((1, 4, 8), OURS, model, 3, 1),
        "heads of others": lambda: heads.table((1, 4), OTHERS, model, 3, 1),
        "1B, n = 4, joint": lambda: _training("1B", [*one, *joint], None, 10, 4),
        "1B, n = 4, head by head": lambda: _training("1B", one, None, 10, 4),
        "8B layers, bfloat16": lambda: _training("8B", [*eight, *MTP], 6, 10, 4),
        "8B layers, float8": lambda: _training("8B", [*eight, *FLOAT8], 6, 10, 4),
    }


def _small_parts() -> dict[str, Callable[[], Rows]]:
    shape = {"n": 1, "n_rows": 64, "dim": 32, "vocab": 512, "dtype": "float32"}
    model = {"layers": 2, "dim": 64, "vocab": 512, "seq_len": 64, "batch_size": 1}
    model |= {"ac": "none", "dtype": "float32"}
    common = ["--model.name", "llama3", "--model.flavor", "quickstart"]
    common += ["--training.seq_len", "64", "--training.local_batch_size", "1"]
    common += ["--training.mixed_precision_param", "float32"]
    emulated = ["--quantize.linear.float8.emulate", "true"]
    return {
        "gemm": lambda: gemm.table(128, GEMM_DTYPES),
        "loss": lambda: loss.compare(shape, ("chunked",), 1, 1),
        "heads": lambda: heads.table((1, 2), OURS[1:2], model, 1, 1),
        "1B, n = 4, head by head": lambda: _training("1B", [*common, *MTP], 3, 1, 1),
        "8B layers, float8": lambda: _training("8B", [*common, *FLOAT8, *emulated], 3, 1, 1),
    }
