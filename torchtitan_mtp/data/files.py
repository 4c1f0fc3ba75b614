"""Reading spans of files that may change under a run, and what identifies a set of files."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from torchtitan_mtp.data.document import SKIPPED, Document
from torchtitan_mtp.errors import UserError, reading

WHOLE_HASH_BYTES = 1 << 30  # corpora up to this size are hashed in full
SAMPLE_BYTES = 64 << 10  # of each file of a larger corpus: this much at both ends
_STEP = 1 << 20


class DataFile:
    """The bytes of one file, which must stay as they were when this object was made.

    Reads, not a memory map: a file cut short while it is mapped kills the process with SIGBUS,
    where a short read can be reported. The file is opened anew for each read, so a corpus of any
    number of files holds no descriptors. shown: how messages call it (a compressed file's own name,
    where `path` is its contents).
    """

    def __init__(self, path: Path, shown: Path | None = None) -> None:
        self.path = path
        self.shown = shown or path
        with reading(f"data {self.shown}"), open(path, "rb") as f:
            now = os.fstat(f.fileno())
        self.size, self._written = now.st_size, now.st_mtime_ns

    def read(self, start: int, stop: int) -> bytes:
        """Bytes start..stop-1. Raises UserError if they can't be read, or were written to since."""
        with reading(f"data {self.shown}"), open(self.path, "rb") as f:
            now = os.fstat(f.fileno())
            f.seek(start)
            data = f.read(stop - start)
        if now.st_mtime_ns != self._written or len(data) != stop - start:
            raise UserError(
                f"data {self.shown}: {self.size} bytes when the run began, {now.st_size} now, and"
                " written to since; put the file back, whose content is compared then, and resume:"
                " a corpus must not change under a run"
            )
        return data

    def line_number(self, offset: int) -> int:
        """1-based number of the line that the byte at `offset` is in (for messages: it reads the
        file up to there)."""
        steps = range(0, offset, _STEP)
        return 1 + sum(self.read(i, min(i + _STEP, offset)).count(b"\n") for i in steps)


class BadRecords:
    """What the scan of the files does with records that are no documents.

    Args:
        action: "stop": raise a UserError at the first. "skip": count them.
    """

    def __init__(self, action: str) -> None:
        self._action, self.count, self.first = action, 0, ""
        self.has_conversations = False  # among the records that are documents

    def size_of(self, read: Callable[[], Document], where: str) -> int:
        """UTF-8 bytes of the document that `read` gives, SKIPPED where it raises a ValueError."""
        try:
            document = read()
        except ValueError as e:
            self.add(where, str(e))
            return SKIPPED
        self.has_conversations |= bool(document.conversation)
        return sum(len(part.encode()) for part in document)

    def add(self, where: str, found: str) -> None:
        if self._action == "stop":
            raise UserError(
                f"data {where}: {found}; mend it, or leave such records out with"
                " --training.bad_records skip"
            )
        self.count += 1
        self.first = self.first or f"{where}: {found}"


def not_utf8(e: UnicodeDecodeError) -> str:
    return f"byte {e.object[e.start]:#04x} is not UTF-8 (iconv -t utf-8 converts it)"


def fingerprint_files(root: Path, paths: Sequence[Path]) -> str:
    """Identity of an ordered list of files: names relative to `root`, sizes and contents.

    SHA-256 of every byte up to WHOLE_HASH_BYTES in all; of a larger corpus, of both ends
    (SAMPLE_BYTES each) of every file. No times: a copied corpus is the same corpus.
    """
    files = [DataFile(path) for path in paths]
    whole = sum(file.size for file in files) <= WHOLE_HASH_BYTES
    digest = hashlib.sha256()
    for file in files:
        name = os.path.relpath(file.path, root).replace(os.sep, "/")
        digest.update(f"{name}\0{file.size}\0".encode("utf-8", errors="surrogateescape"))
        if whole or file.size <= 2 * SAMPLE_BYTES:
            spans = [(i, min(i + _STEP, file.size)) for i in range(0, file.size, _STEP)]
        else:
            spans = [(0, SAMPLE_BYTES), (file.size - SAMPLE_BYTES, file.size)]
        for start, stop in spans:
            digest.update(file.read(start, stop))
    return digest.hexdigest()
