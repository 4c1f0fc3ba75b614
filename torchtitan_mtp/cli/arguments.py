"""What several programs share: arguments, numbers held against the memory there is, the exit."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchtitan_mtp.distributed.memory import check_memory
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.trunk import Trunk


def new_parser(about: str | None) -> argparse.ArgumentParser:
    """Of a program whose docstring is what --help says."""
    return argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def path(text: str) -> Path:
    """`type=` of an argument that is a file or folder; "~" is the home folder, also where a shell
    leaves it, as in `--json=~/figures.json`."""
    return Path(os.path.expanduser(text))


def check_generation(model: Trunk, what: str, rows: int, tokens: int) -> None:
    """UserError where keys and values of `rows` texts of `tokens`, of which `what` names the
    arguments, can't fit."""
    args, weight = model.args, model.output.weight
    width = 2 * args.kv_heads * args.head_dim
    if args.latent is not None:
        width = args.latent.kv_lora_rank + args.latent.qk_rope_head_dim
    size = rows * tokens * args.n_layers * width * weight.element_size()
    check_memory({what: size}, weight.device)


def sampling(args: argparse.Namespace, model: Trunk) -> dict[str, Any]:
    """What `generate` and `Sampler` take of the arguments."""
    names = ("temperature", "top_k", "top_p", "seed")
    return {name: getattr(args, name) for name in names} | {"softcap": model.softcap}


def exit_status(program: Callable[[], None]) -> int:
    """Run a program: 0, or 1 after a UserError, whose one line goes to stderr."""
    try:
        program()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
