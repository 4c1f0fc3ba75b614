"""Benchmarks, one sub-command each: `python scripts/benchmark.py loss --help`."""

from __future__ import annotations

import tyro
from benchmarks import loss

COMMANDS = {"loss": loss.run}


def main() -> None:
    # tyro takes a lone function for the whole program, hence the explicit sub-command.
    tyro.extras.subcommand_cli_from_dict(COMMANDS, description=__doc__)


if __name__ == "__main__":
    main()
