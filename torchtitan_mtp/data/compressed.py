"""Compressed files, decompressed once so that their documents can be read in any order."""

import gzip
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from torchtitan_mtp.errors import UserError, import_optional
from torchtitan_mtp.writing import written_whole

SUFFIXES = (".gz", ".zst")


def decompress(path: Path) -> Path:
    """The contents of a .gz or .zst file, as a file in this user's folder below the temporary one.

    It is named by the SHA-256 of the compressed file, so it is made once for all runs, and appears
    whole or not at all.

    Raises:
        UserError: a damaged file, no room for its contents, zstandard not installed.
    """
    folder = Path(tempfile.gettempdir()) / f"torchtitan_mtp-{os.getuid()}"
    missing = f"data {path}: reading it needs zstandard: pip install zstandard"
    kind = gzip if path.suffix.lower() == ".gz" else import_optional("zstandard", missing)
    digest = hashlib.sha256()
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise UserError(f"data cache {folder}: belongs to another user; set TMPDIR elsewhere")
        with open(path, "rb") as packed:
            while block := packed.read(1 << 20):
                digest.update(block)
        target = folder / digest.hexdigest()
        if not target.exists():
            with written_whole(target) as part, open(part, "wb") as out, open(path, "rb") as data:
                if kind is gzip:
                    shutil.copyfileobj(gzip.GzipFile(fileobj=data), out, 1 << 20)
                else:
                    out.writelines(_decompress_frames(data, kind.ZstdDecompressor()))
    except UserError:
        raise
    except Exception as e:  # gzip's, zlib's, zstandard's and the system's errors
        raise UserError(f"data {path}: can't be decompressed into {folder}: {e}") from e
    return target


def _decompress_frames(data: BinaryIO, zstd: Any) -> Iterator[bytes]:
    """zstandard's own readers take a file that ends within a frame for a whole one."""
    frame = None
    while block := data.read(1 << 16):
        while block:
            frame = frame or zstd.decompressobj()
            yield frame.decompress(block)
            block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame:
        raise EOFError("the file ends within a frame")


def uncompressed_name(path: Path) -> str:
    """The name of what is in the file, in lower case: without .gz or .zst."""
    name = path.name.lower()
    return name.rpartition(".")[0] if name.endswith(SUFFIXES) else name
