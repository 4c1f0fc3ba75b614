"""What `benchmark.py gpu` measures: parts, their cases, and how long each part may take."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.nn.functional as F

from benchmarks import gpu_cases as cases
from benchmarks.report import Rows
from benchmarks.titan import titan_step


@dataclass(frozen=True)
class Case:
    """Rows of `function(*args)`, in a process of its own; `label` stands before each."""

    label: dict[str, Any]
    function: Callable[..., Rows]
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Part:
    """Cases that share `limit` seconds, the more telling ones first."""

    limit: float
    cases: list[Case] = field(default_factory=list)
    finish: Callable[[Rows], Rows] = lambda rows: rows


def all_parts(trace: Path, small: bool) -> dict[str, Part]:
    """By name. trace: file for the profile of a step."""
    seconds = 0.01 if small else 0.5
    return {
        "products": Part(30, _products(small, seconds)),
        "attention": Part(50, _attention(small, seconds)),
        "loss": Part(80, _loss(small, seconds), _beside_the_roof),
        "training": Part(180, _training(small), with_overheads),
        "TorchTitan": Part(45, _titan(small, seconds)),
        "decoding": Part(45, _decoding(small)),
        "a step": Part(40, _step(small, trace)),
    }


def _products(small: bool, seconds: float) -> list[Case]:
    """At the shapes of the loss's chunk, of 8B's feed-forward, and square."""
    rows, dim, vocab, wide, side = (
        (16, 32, 64, 64, 64) if small else (2048, 4096, 128256, 14336, 8192)
    )
    sizes = {
        "square": (side, side, side),
        "logits": (rows, dim, vocab),
        "gradient of states": (rows, vocab, dim),
        "gradient of weight": (vocab, rows, dim),
        "feed-forward": (4 * rows, dim, wide),
    }
    kinds = ("float32",) if small else ("bfloat16", "tensorwise", "rowwise")
    return [Case({}, cases.products, (sizes, kind, seconds)) for kind in kinds]


def _attention(small: bool, seconds: float) -> list[Case]:
    """A layer of 8B, and of DeepSeek-V3's 16B."""
    common = {"batch": 1, "seq": 64, "document": 16, "dtype": "float32"}
    if not small:
        common |= {"seq": 8192, "document": 1024, "dtype": "bfloat16"}
    grouped = common | {"heads": 32, "kv": 8, "width": 128, "value": 128}
    latent = common | {"heads": 16, "kv": 16, "width": 192, "value": 128}
    plan = [("grouped", "causal"), ("grouped", "mask")]
    if not small:
        plan = [
            (who, kind) for kind in ("causal", "flex", "varlen") for who in ("grouped", "latent")
        ]
        plan.append(("latent", "flex as torch sets it"))
    shapes = {"grouped": grouped, "latent": latent}
    return [
        Case({"attention": who, "by": kind}, cases.attention, (kind, shapes[who], seconds))
        for who, kind in plan
    ]


def _loss(small: bool, seconds: float) -> list[Case]:
    shape = {"n": 1, "n_rows": 8192, "dim": 4096, "vocab": 128256, "dtype": "bfloat16"}
    if small:
        shape |= {"n_rows": 64, "dim": 32, "vocab": 512, "dtype": "float32"}
    ops = [(op, 1) for op in (("chunked",) if small else _loss_ops())]
    if not small:
        ops.insert(1, ("chunked", 4))
    size = "x".join(str(shape[key]) for key in ("n_rows", "dim", "vocab"))
    label = {"size": size, "dtype": shape["dtype"]}
    roof = Case(label | {"op": ROOF}, cases.loss_roof, (shape, seconds))
    return [roof] + [
        Case(label | {"op": op}, cases.loss_op, (op, shape | {"n": n}, 2 if small else 4))
        for op, n in ops
    ]


ROOF = "its three products alone"


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


def _beside_the_roof(rows: Rows) -> Rows:
    roof = next((row["wall_s"] for row in rows if row["op"] == ROOF and "wall_s" in row), None)
    if roof is None:
        return rows
    return [
        row | {"time / products": row["wall_s"] / row["heads"] / roof} if "wall_s" in row else row
        for row in rows
    ]


# name -> flavor, layers, sequences a step: 8B at a depth that fits.
MODELS = {"1B": ("1B", None, 4), "8B's width": ("8B", 6, 2)}
# Model, n, heads, engine, float8's recipe; the more telling ones first.
RUNS = [
    ("1B", 1, "parallel", "head_by_head", ""),
    ("1B", 4, "parallel", "head_by_head", ""),
    ("1B", 4, "sequential", "head_by_head", ""),
    ("8B's width", 1, "parallel", "head_by_head", ""),
    ("8B's width", 4, "parallel", "head_by_head", ""),
    ("8B's width", 4, "parallel", "head_by_head", "tensorwise"),
    ("8B's width", 4, "parallel", "head_by_head", "rowwise"),
    ("8B's width", 2, "sequential", "head_by_head", ""),
    ("1B", 4, "parallel", "joint", ""),
    ("1B", 2, "parallel", "head_by_head", ""),
    ("8B's width", 1, "parallel", "head_by_head", "tensorwise"),
    ("8B's width", 1, "parallel", "head_by_head", "rowwise"),
    ("8B's width", 4, "parallel", "joint", ""),
    ("1B", 2, "sequential", "head_by_head", ""),
]
SMALL_RUNS = [("1B", 1, *RUNS[0][2:]), ("1B", 2, *RUNS[0][2:4], "tensorwise")]


def _arguments(model: str, n: int, heads: str, engine: str, float8: str, small: bool) -> list[str]:
    """Of `torchtitan_mtp.train`; the data is this Python's library, the tokens are bytes."""
    flavor, _, batch = MODELS[model]
    keys: dict[str, Any] = {"model.name": "llama3", "model.flavor": flavor}
    keys |= {"training.seq_len": 4096, "training.local_batch_size": batch}
    keys |= {"compile.enable": "true", "training.mixed_precision_param": "bfloat16"}
    keys |= {"activation_checkpoint.mode": "selective"}
    keys |= {"activation_checkpoint.selective_ac_option": "op"}
    converters = []
    if n > 1:
        converters.append("mtp")
        keys |= {"mtp.num_future_tokens": n, "mtp.heads": heads, "mtp.engine": engine}
    if float8:
        converters.append("quantize.linear.float8")
        keys |= {"quantize.linear.float8.recipe_name": float8}
    if converters:
        keys |= {"model.converters": ",".join(converters)}
    if small:
        keys |= {"model.flavor": "quickstart", "training.seq_len": 64, "compile.enable": "false"}
        keys |= {"training.local_batch_size": 1, "training.mixed_precision_param": "float32"}
        keys |= {"quantize.linear.float8.emulate": "true"} if float8 else {}
    return [word for key, value in keys.items() for word in (f"--{key}", str(value))]


def _training(small: bool) -> list[Case]:
    steps, warmup = (1, 1) if small else (6, 3)
    return [
        Case(
            {"model": model},
            cases.training,
            (_arguments(model, *rest, small), 2 if small else MODELS[model][1], steps, warmup),
        )
        for model, *rest in (SMALL_RUNS if small else RUNS)
    ]


def with_overheads(rows: Rows) -> Rows:
    """And of each the time that a head adds, in percent of a step with n = 1 of the same model."""
    plain = {(row["model"], row["float8"]): row["tokens/s"] for row in rows if row.get("n") == 1}
    for row in rows:
        rate = plain.get((row["model"], row.get("float8")))
        if row.get("n", 1) > 1 and rate:
            row["% a head"] = 100 * (rate / row["tokens/s"] - 1) / (row["n"] - 1)
    return rows


def _titan(small: bool, seconds: float) -> list[Case]:
    sizes = {"family": "llama3", "flavor": "quickstart" if small else "1B", "tokenizer_vocab": 260}
    rest = (1, 64, "float32", seconds) if small else (4, 4096, "bfloat16", 4 * seconds)
    return [Case({"model": "1B", "n": 1}, titan_step, (sizes, *rest))]


def _decoding(small: bool) -> list[Case]:
    model = {"family": "llama3", "flavor": "quickstart" if small else "1B", "tokenizer_vocab": 260}
    sizes = {"model": model, "n": 4, "dtype": "float32" if small else "bfloat16"}
    modes = ("eager",) if small else ("eager", "graphs", "compiled", "compiled_graphs")
    new, repeats = (4, 1) if small else (64, 2)
    return [Case({"model": "1B"}, cases.decoding, (sizes, mode, new, repeats)) for mode in modes]


def _step(small: bool, trace: Path) -> list[Case]:
    arguments = _arguments("1B", 2 if small else 4, *RUNS[1][2:], small)
    return [Case({}, cases.traced, (arguments, 2 if small else None, 2, trace))]
