"""CRC-32 of every 4 MiB piece of a file: made while it is written, compared while it is read.

Pieces rather than files, so that many are checked at once, also of one large file, and so that
only what is read has to be. CRC-32 because it has to keep up with the disk on a core or two:
it notices any burst of 32 bits and any two flipped bits of a piece, and all but one in 4 * 10^9 of
other accidents. It does not protect from forgers, who would write a new manifest.
"""

from __future__ import annotations

import os
import re
import threading
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torchtitan_mtp.checkpoint.remote import RemotePath, read_span
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

    def piece(self, number: int) -> int:
        return int(self.crc32[8 * number : 8 * number + 8], 16)


class Checksum:
    """The `FileEntry` of what is written, from beginning to end."""

    def __init__(self) -> None:
        self._size, self._crc = 0, 0
        self._done: list[str] = []

    def update(self, data: memoryview) -> None:
        """Add bytes; the interpreter lock is free meanwhile."""
        start = 0
        while start < len(data):
            part = data[start : start + PIECE - self._size % PIECE]
            self._crc = zlib.crc32(part, self._crc)
            self._size += len(part)
            start += len(part)
            if self._size % PIECE == 0:
                self._done.append(f"{self._crc:08x}")
                self._crc = 0

    def entry(self) -> FileEntry:
        last = [f"{self._crc:08x}"] if self._size % PIECE else []
        return FileEntry(self._size, "".join([*self._done, *last]))


def check_file(file: Path, entry: FileEntry) -> bytes:
    """The content of a small file, which is what was written.

    Raises:
        UserError: it is not.
    """
    content = read_span(file, 0, max(entry.bytes, 1))
    for number in range(-(-entry.bytes // PIECE)):
        check_piece(file, entry, number, content[number * PIECE : (number + 1) * PIECE])
    return content


def remedy(file: Path | RemotePath) -> str:
    """What helps against a damaged file of a step: another step, where there is one."""
    step, folder = file.resolve().parents[:2]
    others = [e for e in folder.iterdir() if re.fullmatch(r"step-\d+", e.name)]
    if any(e.name != step.name and (e / ".metadata").is_file() for e in others):
        return "restore it, or load another step (checkpoint.load_step)"
    return "restore it, or start anew in another folder (job.dump_folder): there is no other step"


def check_piece(
    file: Path | RemotePath, entry: FileEntry, number: int, data: bytes | memoryview
) -> None:
    """Raises UserError unless `data` is the file's piece of that number."""
    start = number * PIECE
    size = min(PIECE, entry.bytes - start)
    if len(data) != size:
        raise UserError(f"{file}: ends before byte {start + size}: damaged; {remedy(file)}")
    if entry.crc32 and (found := zlib.crc32(data)) != entry.piece(number):
        raise UserError(
            f"{file}: bytes {start} to {start + size - 1} have the checksum {found:08x}, expected "
            f"{entry.piece(number):08x}: damaged; {remedy(file)}"
        )


def check_size(file: Path, entry: FileEntry, listed_in: str) -> None:
    """Raises UserError unless the file is there with its size."""
    if not file.is_file():
        raise UserError(f"{file}: missing, but {listed_in} lists it; {remedy(file)}")
    if (size := file.stat().st_size) != entry.bytes:
        raise UserError(f"{file}: {size} bytes, expected {entry.bytes}: damaged; {remedy(file)}")


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
        self._buffers = threading.local()
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
        file = self._folder / name
        check_piece(file, self._entries[name], number, self._read(file, number))

    def _read(self, file: Path, number: int) -> bytes | memoryview:
        """A piece in this thread's buffer: fresh memory for each would cost more than the sum."""
        if isinstance(file, RemotePath):
            return file.read_span(number * PIECE, (number + 1) * PIECE)
        if not hasattr(self._buffers, "view"):
            self._buffers.view = memoryview(bytearray(PIECE))
        view: memoryview = self._buffers.view
        with open(file, "rb", buffering=0) as stream:
            count = os.preadv(stream.fileno(), [view], number * PIECE)
        return view[:count]


def _pieces(name: str, start: int, length: int) -> list[tuple[str, int]]:
    """The pieces that a span touches."""
    last = start + max(length, 1) - 1
    return [(name, number) for number in range(start // PIECE, last // PIECE + 1)]
