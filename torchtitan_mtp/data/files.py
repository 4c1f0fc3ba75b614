"""Reading spans of files that may change under a run, and what identifies a set of files."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from torchtitan_mtp.errors import UserError

WHOLE_HASH_BYTES = 1 << 30  # corpora up to this size are hashed in full
SAMPLE_BYTES = 64 << 10  # of each file of a larger corpus: this much at both ends


def file_size(path: Path) -> int:
    """Size in bytes. Raises UserError where the file can't be read."""
    try:
        with open(path, "rb") as f:
            return os.fstat(f.fileno()).st_size
    except OSError as e:
        raise UserError(f"data {path}: can't be read: {e.strerror}") from e


def read_span(path: Path, start: int, stop: int, size: int) -> bytes:
    """Bytes start..stop-1 of a file that had `size` bytes when it was indexed.

    A read, not a memory map: a file cut short while mapped kills the process with SIGBUS, a short
    read can be reported.

    Raises:
        UserError: the file can't be read any more, or its size has changed.
    """
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as e:
        raise UserError(f"data {path}: can't be read: {e.strerror}") from e
    try:
        now = os.fstat(fd).st_size
        data = bytearray()
        while len(data) < stop - start:
            piece = os.pread(fd, stop - start - len(data), start + len(data))
            if not piece:
                break
            data += piece
    except OSError as e:
        raise UserError(f"data {path}: can't be read: {e.strerror}") from e
    finally:
        os.close(fd)
    if now != size or len(data) != stop - start:
        raise UserError(
            f"data {path}: {size} bytes when the run began, {now} now; put the file back and"
            " resume, and never change a corpus under a run"
        )
    return bytes(data)


def decode_span(path: Path, start: int, data: bytes) -> str:
    """UTF-8 text of bytes read at `start`. Raises UserError naming file and line."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        line = line_number(path, start + e.start)
        raise UserError(
            f"data {path}:{line}: byte {e.object[e.start]:#04x} is not UTF-8; convert the file"
            " (iconv -t utf-8) or leave it out"
        ) from e


def line_number(path: Path, offset: int) -> int:
    """1-based number of the line that holds the byte at `offset` (for error messages)."""
    with open(path, "rb") as f:
        return f.read(offset).count(b"\n") + 1


def fingerprint_files(root: Path, files: Sequence[Path]) -> str:
    """Identity of an ordered list of files: names relative to `root`, sizes and contents.

    SHA-256 of every byte up to WHOLE_HASH_BYTES in all; of a larger corpus, of both ends
    (SAMPLE_BYTES each) of every file. No times: a copied corpus is the same corpus.
    """
    sizes = [file_size(file) for file in files]
    whole = sum(sizes) <= WHOLE_HASH_BYTES
    digest = hashlib.sha256()
    for file, size in zip(files, sizes, strict=True):
        name = os.path.relpath(file, root).replace(os.sep, "/")
        digest.update(f"{name}\0{size}\0".encode("utf-8", errors="surrogateescape"))
        step = max(1 << 20, SAMPLE_BYTES)
        spans = [(i, min(i + step, size)) for i in range(0, size, step)]
        if not whole and size > 2 * SAMPLE_BYTES:
            spans = [(0, SAMPLE_BYTES), (size - SAMPLE_BYTES, size)]
        for start, stop in spans:
            digest.update(read_span(file, start, stop, size))
    return digest.hexdigest()
