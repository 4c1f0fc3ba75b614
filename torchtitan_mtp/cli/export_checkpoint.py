"""Write a trained model for other programs.

CHECKPOINT is a step-N folder, or a run's folder, whose latest step is taken; any number of ranks
may have written it. OUT is a new folder. docs/serving.md has the formats and what reads them.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys

import torch

from torchtitan_mtp.build import model_summary
from torchtitan_mtp.cli.arguments import exit_status, new_parser
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats import DEFAULT_SHARD_SIZE, FORMATS, SAME, export_checkpoint

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB", "1000". Error: none of these."""
    match = re.fullmatch(r"([0-9]{1,18})\s*(|KB|MB|GB)", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise UserError(f"--max_shard_size {text}: expected a size such as 5GB or 500MB")
    return int(match[1]) * UNITS[match[2]]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """--help, and what argparse refuses, end the program: SystemExit, of status 0 and 2."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "checkpoint", type=os.path.expanduser, help="a step-N folder, or a run's folder"
    )
    parser.add_argument("out", type=os.path.expanduser, help="the folder to make")
    parser.add_argument("--format", required=True, help=f"one of {', '.join((*FORMATS, SAME))}")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as stored")
    parser.add_argument(
        "--max_shard_size", default=str(DEFAULT_SHARD_SIZE), help="of a file; default: 5GB"
    )
    parser.add_argument(
        "--drop_heads", action="store_true", help="leave out heads that the format can't hold"
    )
    parser.add_argument("--modules", type=int, help="further heads to write; default: all")
    parser.add_argument(
        "--from",
        dest="origin",
        default="",
        type=os.path.expanduser,
        help="same only: the folder that the run began from; default: its model.hf_assets_path",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, or 1 after one line on stderr that says what is wrong."""
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)

    def program() -> None:
        spec = export_checkpoint(
            args.checkpoint,
            args.out,
            args.format,
            dtype=DTYPES[args.dtype] if args.dtype else None,
            max_shard_size=parse_size(args.max_shard_size),
            drop_heads=args.drop_heads,
            modules=args.modules,
            origin=args.origin,
        )
        print(f"wrote {args.out}: {args.format}, {model_summary(spec)}")

    return exit_status(program)


if __name__ == "__main__":
    sys.exit(main())
