"""`benchmark.py gemm`: matrix-product rates and copy bandwidth, the limit of everything else."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import matmul_flops_per_second
from benchmarks.report import report


def run(
    size: int | None = None,
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float8_e4m3fn"),
    json: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Fastest measured rate of square matrix products in each dtype, and of a copy.

    Args:
        size: side of the matrices; default 8192 on CUDA, 2048 on CPUs (256 in dtypes that a CPU
            only emulates).
        dtypes: a dtype that the device cannot multiply is left out.
        json: file for the figures.
        plot: PNG file for a bar chart.
    """
    rows = table(size, dtypes)
    report(rows, json, plot, bars=("rate",))


def table(size: int | None, dtypes: tuple[str, ...]) -> list[dict[str, Any]]:
    """A row for each dtype, in GFLOP/s, and one for the copy, in GB/s (bytes read and written)."""
    cuda = torch.cuda.is_available()
    rows: list[dict[str, Any]] = []
    for name in dtypes:
        dtype = getattr(torch, name)
        emulated = not cuda and dtype != torch.float32
        side = size or (8192 if cuda else 256 if emulated else 2048)
        if name.startswith("float8"):
            if not cuda or torch.cuda.get_device_capability() < (8, 9):
                continue
            rate = _float8_flops_per_second(dtype, side)
        else:
            rate = matmul_flops_per_second(dtype, side)
        rows.append({"what": f"matmul {name}", "size": side, "rate": rate / 1e9, "unit": "GFLOP/s"})
    megabytes = 1024 if cuda else 256
    rate = _copy_bytes_per_second(megabytes * 2**20)
    rows.append({"what": "copy", "size": megabytes, "rate": rate / 1e9, "unit": "GB/s"})
    return rows


def _float8_flops_per_second(dtype: torch.dtype, size: int) -> float:
    a = torch.randn(size, size, device="cuda").to(dtype)
    b = torch.randn(size, size, device="cuda").to(dtype).t()  # column-major, as the product needs
    one = torch.ones((), device="cuda")
    seconds = _fastest(lambda: torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16))
    return 2 * size**3 / seconds


def _copy_bytes_per_second(size: int) -> float:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / _fastest(lambda: target.copy_(source))


def _fastest(call: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest call."""
    best = float("inf")
    for _ in range(repeats):
        _synchronize()
        start = time.perf_counter()
        call()
        _synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
