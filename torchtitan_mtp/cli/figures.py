"""What every picture begins with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchtitan_mtp.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches. Error: matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is missing: pip install matplotlib, or the dev extra") from None
    return Figure(figsize=(width, height), layout="constrained")
