"""Entry point: `python -m torchtitan_mtp.train --job.config_file F [--section.key value ...]`."""

from __future__ import annotations

import os
import sys

from torchtitan_mtp.config import parse_args, to_toml
from torchtitan_mtp.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Parse, build, run; the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    debug = any(a.startswith("--job.debug") for a in argv)
    try:
        config = parse_args(argv)
        debug = config.job.debug
        # After the configuration: `--help` and a mistyped key should not wait for torch.
        from torchtitan_mtp.monitoring.logging import init_logging, use_color
        from torchtitan_mtp.trainer import Trainer

        init_logging(rank, size, color=use_color(config.metrics.disable_color_printing))
        if config.job.print_config and rank == 0:
            print(to_toml(config))
        trainer = Trainer(config)
        try:
            trainer.train()
        finally:
            trainer.close()
    except UserError as error:
        if debug:
            raise
        who = f"[rank {rank}] " if size > 1 else ""
        print(f"{who}error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
