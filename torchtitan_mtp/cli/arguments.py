"""Arguments of several programs: paths, and numbers held against the memory there is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torchtitan_mtp.distributed.memory import check_memory
from torchtitan_mtp.models.transformer import Transformer


def path(text: str) -> Path:
    """`type=` of an argument that is a file or folder; "~" is the home folder, also where a shell
    leaves it, as in `--json=~/figures.json`."""
    return Path(os.path.expanduser(text))


def check_generation(model: Transformer, what: str, rows: int, tokens: int) -> None:
    """UserError where keys and values of `rows` texts of `tokens`, of which `what` names the
    arguments, can't fit."""
    blocks: list[Any] = list(model.layers.values())
    shapes = [block.attention.cache_shape for block in blocks]
    width = sum(heads * sum(widths) for heads, *widths in shapes)
    weight = model.norm.weight
    check_memory({what: rows * tokens * width * weight.element_size()}, weight.device)
