"""Read another program's model.

OUT becomes a run's folder: step-0, config.toml and tokenizer. generate.py continues text with it;
`checkpoint.initial_load_path = "OUT"` starts a training from it. docs/serving.md has the formats.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

import torch

from torchtitan_mtp.build import model_summary
from torchtitan_mtp.cli.arguments import exit_status, new_parser
from torchtitan_mtp.formats import FORMATS, import_checkpoint

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """--help, and what argparse refuses, end the program: SystemExit, of status 0 and 2."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "source",
        type=os.path.expanduser,
        help='the folder to read, or "org/name" of a model that `hf download` has put here',
    )
    parser.add_argument("out", type=os.path.expanduser, help="the folder to make")
    parser.add_argument(
        "--format", help=f"one of {', '.join(FORMATS)}; default: by the folder's config.json"
    )
    parser.add_argument(
        "--config", type=os.path.expanduser, help="torchtitan only: the run's TOML file"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as stored")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, or 1 after one line on stderr that says what is wrong."""
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)

    def program() -> None:
        spec = import_checkpoint(
            args.source,
            args.out,
            args.format,
            config_file=args.config,
            dtype=DTYPES[args.dtype] if args.dtype else None,
        )
        print(f"wrote {args.out}: {model_summary(spec)}")

    return exit_status(program)


if __name__ == "__main__":
    sys.exit(main())
