"""`benchmark.py gpu`: everything that one GPU has to tell, in under eight minutes; `benchmark.py
page`: its tables in Markdown."""

from __future__ import annotations

import json as json_lib
import time
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.gpu_plan import Part, all_parts
from benchmarks.measure import in_process
from benchmarks.report import Rows, markdown, write_json
from torchtitan_mtp.errors import UserError

LIMIT = 460.0  # seconds of all parts together


def run(json: Path = Path("gpu.json"), parts: tuple[str, ...] = (), small: bool = False) -> None:
    """The GPU set on one GPU of at least 80 GB; one JSON file, written after every part.

    A case that fails, dies or takes longer than its part may is noted, and the others go on.

    Args:
        json: file for the figures; the profile of a step goes beside it.
        parts: the parts to run, by name and in this order; all of them where none is named.
        small: sizes for a machine without a GPU, which show that it runs and nothing else.
    """
    if not torch.cuda.is_available() and not small:
        raise UserError(
            "benchmark gpu: found no CUDA device, expected one with at least 80 GB; run it on such "
            "a machine, or with --small to try the program on this CPU"
        )
    known = all_parts(json.with_suffix(".trace.json.gz"), small)
    if unknown := [name for name in parts if name not in known]:
        raise UserError(f"benchmark gpu: no part {unknown[0]!r}; there are {', '.join(known)}")
    results: dict[str, Any] = {}
    end = time.perf_counter() + LIMIT
    for name in parts or known:
        start = time.perf_counter()
        rows = measure_part(known[name], min(end, start + known[name].limit))
        seconds = time.perf_counter() - start
        print(f"\n{name} ({seconds:.0f} s)\n{markdown(rows)}", flush=True)
        results[name] = {"seconds": seconds, "rows": rows}
        write_json(json, {"parts": results})
    print(f"wrote {json}")


def measure_part(part: Part, end: float) -> Rows:
    """The part's rows; `end` in seconds of `time.perf_counter`."""
    rows: Rows = []
    for case in part.cases:
        left = end - time.perf_counter()
        try:
            if left <= 0:
                raise TimeoutError("left out: the time of its part is over")
            found = in_process(case.function, *case.args, limit=left)
            rows += [case.label | row for row in found]
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            rows.append(case.label | {"error": f"{type(error).__name__}: {first}"})
    return part.finish(rows)


def page(json: tyro.conf.Positional[Path]) -> None:
    """Print the tables of a file of `benchmark.py gpu`, in Markdown.

    Args:
        json: that file.
    """
    results = json_lib.loads(json.read_text())
    about = ", ".join(f"{key} {results[key]}" for key in results if key not in ("command", "parts"))
    print(f"`{results['command']}`\n\n{about}")
    for name, part in results["parts"].items():
        print(f"\n**{name[0].upper()}{name[1:]}** ({part['seconds']:.0f} s)\n")
        print(markdown(part["rows"]))
