"""What a sub-command ends with: its table on the console, in a JSON file and as a chart."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from torchtitan_mtp.cli.figures import new_figure, save_figure
from torchtitan_mtp.errors import writing
from torchtitan_mtp.writing import written_whole

Rows = list[dict[str, Any]]


def report(rows: Rows, json: Path | None, plot: Path | None, bars: Sequence[str]) -> None:
    """Print the rows, and write them where a file is given.

    bars: the columns that the chart shows, one panel each.
    """
    print(", ".join(f"{key}: {value}" for key, value in machine().items()))
    print(markdown(rows))
    if json is not None:
        write_json(json, {"rows": rows})
        print(f"wrote {json}")
    if plot is not None:
        _draw(rows, plot, bars)
        print(f"wrote {plot}")


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    } | (_gpu() if cuda else {})


def _gpu() -> dict[str, str | int]:
    """Versions, and what nvidia-smi tells of the GPU at this moment."""
    triton = importlib.util.find_spec("triton")
    found: dict[str, str | int] = {
        "CUDA": str(torch.version.cuda),
        "cuDNN": torch.backends.cudnn.version() or 0,
        "triton": importlib.metadata.version("triton") if triton else "none",
    }
    asked = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
    this = f"--id=GPU-{torch.cuda.get_device_properties().uuid}"
    command = ["nvidia-smi", this, f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        values = told.stdout.strip().split(", ")
        found |= dict(zip(asked, values, strict=True))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        found["nvidia-smi"] = type(error).__name__
    return found


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def markdown(rows: Rows) -> str:
    """A table with the rows' keys as its head; what a row lacks is empty."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(key, "")) for key in keys] for row in rows]
    lines = [keys, ["---"] * len(keys), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_json(path: Path, results: dict[str, Any]) -> None:
    """The results with command and machine beside them."""
    about = {"command": "python " + shlex.join(sys.argv), **machine()}
    with writing(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            file.write_text(json.dumps(about | results, indent=1) + "\n")


def _draw(rows: Rows, path: Path, bars: Sequence[str]) -> None:
    """A bar a row; what stands before the first measured column names it."""
    names = [", ".join(map(str, itertools.takewhile(_names, row.values()))) for row in rows]
    figure = new_figure(5 * len(bars), 1 + 0.3 * len(rows))
    panels = figure.subplots(1, len(bars), sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, bars, strict=True):
        axes.barh(range(len(rows)), [row[column] for row in rows])
        axes.set(yticks=range(len(rows)), yticklabels=names, xlabel=column)
    panels[0].invert_yaxis()
    with writing(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path, dpi=100)


def _names(value: object) -> bool:
    return not isinstance(value, float)
