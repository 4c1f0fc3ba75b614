"""Paths as arguments: what a shell leaves of `--json=~/figures.json`."""

from __future__ import annotations

import os
from pathlib import Path


def path(text: str) -> Path:
    """`type=` of an argument that is a file or folder; "~" is the home folder."""
    return Path(os.path.expanduser(text))
