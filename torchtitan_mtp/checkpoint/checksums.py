"""CRC-32 of every 4 MiB piece of a file: made while it is written, compared while it is read.

Pieces rather than files, so that many are checked at once, also of one large file, and so that
only what is read has to be. CRC-32 because it has to keep up with the disk on a core or two:
it notices any burst of 32 bits and any two flipped bits of a piece, and all but one in 4 * 10^9 of
other accidents. It does not protect from forgers, who would write a new manifest.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan_mtp.checkpoint.remote import RemotePath
from torchtitan_mtp.errors import UserError

PIECE = 4 << 20
_THREADS = min(8, os.cpu_count() or 1)


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


def check_content(file: Path | RemotePath, entry: FileEntry, content: bytes) -> None:
    """Raises UserError unless `content` is the whole file."""
    for number in range(-(-entry.bytes // PIECE)):
        check_piece(file, entry, number, content[number * PIECE : (number + 1) * PIECE])


def remedy(file: Path | RemotePath) -> str:
    """What helps against a damaged file of a step: another step, where there is one."""
    step, folder = file.resolve().parents[:2]
    others = [e for e in folder.iterdir() if re.fullmatch(r"step-\d+", e.name)]
    if any(e.name != step.name and (e / ".metadata").is_file() for e in others):
        return "restore it, or load another step (checkpoint.load_step)"
    return "restore it, or start anew in another folder (job.dump_folder): there is no other step"


def check_piece(file: Path | RemotePath, entry: FileEntry, number: int, data: bytes) -> None:
    """Raises UserError unless `data` is the file's piece of that number."""
    start = number * PIECE
    size = min(PIECE, entry.bytes - start)
    if len(data) != size:
        raise UserError(f"{file}: ends before byte {start + size}: damaged; {remedy(file)}")
    found, expected = f"{zlib.crc32(data):08x}", entry.crc32[8 * number : 8 * number + 8]
    if entry.crc32 and found != expected:
        raise UserError(
            f"{file}: bytes {start} to {start + size - 1} have the checksum {found}, expected "
            f"{expected}: damaged; {remedy(file)}"
        )


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


class Verifier:
    """Compares the pieces of files that are about to be read, in threads, some way ahead.

    Args:
        folder: of the files.
        entries: what they must be, by name.
        spans: (name, start, length) of all that will be waited for, in about that order.
    """

    def __init__(
        self, folder: Path, entries: dict[str, FileEntry], spans: Iterable[tuple[str, int, int]]
    ) -> None:
        self._folder, self._entries = folder, entries
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="checksums")
        pieces = dict.fromkeys(piece for span in spans for piece in _pieces(*span))
        self._checks = {piece: self._pool.submit(self._check, *piece) for piece in pieces}

    def wait(self, name: str, start: int, length: int) -> None:
        """Return once a span is known to be what was written.

        Raises:
            UserError: naming file and place, when it is not.
        """
        for piece in _pieces(name, start, length):
            self._checks[piece].result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _check(self, name: str, number: int) -> None:
        file, start = self._folder / name, number * PIECE
        if isinstance(file, RemotePath):
            data = file.read_span(start, start + PIECE)
        else:
            with open(file, "rb", buffering=0) as stream:
                data = os.pread(stream.fileno(), PIECE, start)
        check_piece(file, self._entries[name], number, data)


def _pieces(name: str, start: int, length: int) -> list[tuple[str, int]]:
    """The pieces that a span touches."""
    last = start + max(length, 1) - 1
    return [(name, number) for number in range(start // PIECE, last // PIECE + 1)]
