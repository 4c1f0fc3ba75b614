"""Benchmarks, one sub-command each: `python scripts/benchmark.py loss --help`."""

from __future__ import annotations

import sys

import tyro
from benchmarks import (
    busy,
    checkpoint,
    decode,
    gemm,
    gpu,
    heads,
    loss,
    memory,
    overlap,
    speed,
    targets,
    train,
)

from torchtitan_mtp.errors import UserError

COMMANDS = {
    "loss": loss.run,
    "overlap": overlap.run,
    "heads": heads.run,
    "memory": memory.run,
    "speed": speed.run,
    "train": train.run,
    "targets": targets.run,
    "busy": busy.run,
    "decode": decode.run,
    "gemm": gemm.run,
    "gpu": gpu.run,
    "page": gpu.page,
    "checkpoint": checkpoint.run,
}


def main() -> None:
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, description=__doc__)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
