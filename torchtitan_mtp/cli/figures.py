"""What every picture begins and ends with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from torchtitan_mtp.errors import UserError
from torchtitan_mtp.writing import check_writable, written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches. Error: matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is missing: pip install matplotlib, or the dev extra") from None
    return Figure(figsize=(width, height), layout="constrained")


def check_figure(out: Path) -> None:
    """Before what is drawn is measured. Error: `save_figure` could not write to `out`."""
    kinds = new_figure(1, 1).canvas.get_supported_filetypes()
    if out.suffix[1:].lower() not in kinds:
        raise UserError(f"{out}: a picture's name ends in one of .png, .svg, .pdf")
    check_writable(out, os.fspath(out))


def save_figure(figure: Figure, out: Path, dpi: int = 110) -> None:
    """Write a picture, of the kind that its suffix names. Error: it can't be written."""
    try:
        with written_whole(out) as file:
            figure.savefig(file, dpi=dpi)
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: can't be written: {error}") from error
