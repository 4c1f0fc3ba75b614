"""CRC-32 of every 4 MiB piece of a file: made while it is written, compared while it is read.

Pieces rather than files, so that many are checked at once, also of one large file, and so that
only what is read has to be. CRC-32 because it has to keep up with the disk on a core or two:
it notices any burst of 32 bits and any two flipped bits of a piece, and all but one in 4 * 10^9 of
other accidents. It does not protect from forgers, who would write a new manifest.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan_mtp.errors import UserError

PIECE = 4 << 20


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: its size in bytes, and the CRC-32 of its pieces, 8 hex digits each.

    As one string, since a large checkpoint has a hundred thousand pieces. "" where the content has
    been compared already.
    """

    bytes: int
    crc32: str


class SummedStream:
    """A stream, and the `FileEntry` of what is written to it from beginning to end."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._size, self._crc = stream, 0, 0
        self._done: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, data: Any) -> int:
        view, start = memoryview(data).cast("B"), 0
        while start < len(view):
            part = view[start : start + PIECE - self._size % PIECE]
            self._crc = zlib.crc32(part, self._crc)  # the interpreter lock is free meanwhile
            self._size += len(part)
            start += len(part)
            if self._size % PIECE == 0:
                self._done.append(f"{self._crc:08x}")
                self._crc = 0
        return int(self._stream.write(data))

    def entry(self) -> FileEntry:
        last = [f"{self._crc:08x}"] if self._size % PIECE else []
        return FileEntry(self._size, "".join([*self._done, *last]))


def remedy(file: Path) -> str:
    """What helps against a damaged file of a step: another step, where there is one."""
    step, folder = file.resolve().parents[:2]
    others = [e for e in folder.iterdir() if re.fullmatch(r"step-\d+", e.name)]
    if any(e.name != step.name and (e / ".metadata").is_file() for e in others):
        return "restore it, or load another step (checkpoint.load_step)"
    return "restore it, or start anew in another folder (job.dump_folder): there is no other step"


def check_piece(file: Path, entry: FileEntry, number: int) -> None:
    """Raises UserError unless the file's piece of that number is what was written."""
    start = number * PIECE
    size = min(PIECE, entry.bytes - start)
    with file.open("rb") as stream:
        stream.seek(start)
        data = stream.read(size)
    if len(data) != size:
        raise UserError(f"{file}: ends before byte {start + size}: damaged; {remedy(file)}")
    found, expected = f"{zlib.crc32(data):08x}", entry.crc32[8 * number : 8 * number + 8]
    if entry.crc32 and found != expected:
        raise UserError(
            f"{file}: bytes {start} to {start + size - 1} have the checksum {found}, expected "
            f"{expected}: damaged; {remedy(file)}"
        )


def pieces_of(start: int, length: int) -> range:
    """The numbers of the pieces that a span of a file touches."""
    return range(start // PIECE, (start + max(length, 1) - 1) // PIECE + 1)


def check_sizes(
    folder: Path, sizes: Mapping[str, int], listed_in: str, at_least: bool = False
) -> None:
    """Raises UserError unless every file of the folder is there with its size, or at least that."""
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file}: missing, but {listed_in} lists it; {remedy(file)}")
        found = file.stat().st_size
        if found < size or (found > size and not at_least):
            expected = f"at least {size}: truncated" if at_least else f"{size}: damaged"
            raise UserError(f"{file}: {found} bytes, expected {expected}; {remedy(file)}")
