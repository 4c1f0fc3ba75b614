"""Compressed files, decompressed once so that their documents can be read in any order."""

import gzip
import hashlib
import os
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

from torchtitan_mtp.errors import UserError

SUFFIXES = (".gz", ".zst")


def decompressed(path: Path, cache_dir: Path | None) -> Path:
    """The contents of a .gz or .zst file, as a file in `cache_dir`.

    It is named by the SHA-256 of the compressed file, so it is made once for all runs, and appears
    whole or not at all. The default folder is this user's, below the system's temporary folder.

    Raises:
        UserError: a damaged file, no room for its contents, zstandard not installed.
    """
    folder = cache_dir or _default_folder()
    partial = ""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        target = folder / _sha256(path)
        if target.exists():
            return target
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".partial", delete=False) as out:
            partial = out.name
            with _opened(path) as contents:
                shutil.copyfileobj(contents, out, 1 << 20)
        os.replace(partial, target)
        partial = ""
    except (OSError, EOFError, zlib.error, _zstd_error()) as e:  # BadGzipFile is an OSError
        raise UserError(f"data {path}: can't be decompressed into {folder}: {e}") from e
    finally:
        if partial:
            os.unlink(partial)
    return target


def name_within(path: Path) -> str:
    """The name of what is in the file, in lower case: without .gz or .zst."""
    name = path.name.lower()
    return name.rpartition(".")[0] if name.endswith(SUFFIXES) else name


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _default_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"torchtitan_mtp-{os.getuid()}"
    if folder.exists() and folder.stat().st_uid != os.getuid():
        raise UserError(f"data cache {folder}: belongs to another user; set TMPDIR elsewhere")
    return folder


def _opened(path: Path) -> Any:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    try:
        import zstandard
    except ImportError as e:
        raise UserError(f"data {path}: reading it needs zstandard: pip install zstandard") from e
    return zstandard.open(path, "rb")


def _zstd_error() -> Any:
    try:
        import zstandard
    except ImportError:
        return OSError
    return zstandard.ZstdError
