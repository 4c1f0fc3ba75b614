"""Files that are whole or absent, whenever their writer dies."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torchtitan_mtp.errors import UserError, writing


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write in place of `path`, which it becomes at one stroke once the disk has it.

    What stands at `path` stays until then. Something that is no file (/dev/stdout) is written to.

    Raises:
        OSError: it can't be written.
    """
    given, target = Path(path), Path(os.path.realpath(path))
    if given.exists() and not given.is_file():
        yield given
        return
    aside = target.with_name(f".{os.getpid()}.tmp.{target.name}")
    try:
        yield aside
        sync(aside)
        aside.replace(target)
        sync(target.parent)
    finally:
        with suppress(OSError):
            aside.unlink()


def check_writable(path: str | os.PathLike[str], what: str) -> None:
    """Before work that ends with a file. UserError: there can be none at `path`, of which `what`
    tells."""
    if Path(path).is_dir():
        raise UserError(f"{what}: can't be written: it is a folder")
    if Path(path).is_file() or not Path(path).exists():
        with writing(what):
            tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))).close()


def sync(path: Path) -> None:
    """Wait until the disk has a file, or a folder's entries (new names, renames)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
