"""`manifest.json`: what a finished checkpoint consists of, written last and verified on load."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from torchtitan_mtp.checkpoint.metadata import bare_name
from torchtitan_mtp.errors import UserError

NAME = "manifest.json"
FORMAT = 1
FULL = "full"
MODEL_ONLY = "model_only"
_BLOCK = 4 << 20  # bytes hashed at a time
_THREADS = 4
_REMEDY = "restore it, or load another step (checkpoint.load_step)"


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: its size in bytes and the SHA-256 of its content."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A finished checkpoint: its step, kind ("full" or "model_only"), rank count and files."""

    step: int
    kind: str
    world_size: int
    files: dict[str, FileEntry]

    @property
    def total_bytes(self) -> int:
        return sum(entry.bytes for entry in self.files.values())


def hash_files(files: Iterable[Path]) -> dict[str, FileEntry]:
    """Size and SHA-256 of each file, by name; several files are read at once."""
    files = list(files)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip((file.name for file in files), pool.map(_hash_file, files), strict=True))


def _hash_file(file: Path) -> FileEntry:
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)  # releases the interpreter lock
            size += len(block)
    return FileEntry(size, digest.hexdigest())


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest into folder `path` and wait until the disk has it."""
    body = {"format": FORMAT, "torch": torch.__version__, **asdict(manifest)}
    with (path / NAME).open("w") as stream:
        json.dump(body | {"sha256": _digest(body)}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


def read_manifest(path: Path) -> Manifest | None:
    """The manifest of folder `path`; None where there is none (written by other tools).

    Raises:
        UserError: the manifest is damaged or of a later format.
    """
    file = path / NAME
    if not file.is_file():
        return None
    try:
        body = json.loads(file.read_text())
        intact = body.pop("sha256") == _digest(body)
        if intact and body["format"] == FORMAT:
            files = {name: FileEntry(**entry) for name, entry in body["files"].items()}
            if all(map(bare_name, files)) and body["kind"] in (FULL, MODEL_ONLY):
                return Manifest(body["step"], body["kind"], body["world_size"], files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a manifest ({error}); {_REMEDY}") from error
    if intact:
        raise UserError(f"{file}: format {body['format']}, expected {FORMAT}; update this program")
    raise UserError(f"{file}: its checksum is wrong: damaged; {_REMEDY}")


def check_sizes(path: Path, manifest: Manifest) -> None:
    """Every file of the manifest is present with its size.

    Raises:
        UserError: naming the first file that is not.
    """
    for name, entry in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise UserError(f"{file}: missing, but {NAME} lists it; {_REMEDY}")
        if (size := file.stat().st_size) != entry.bytes:
            raise UserError(f"{file}: {size} bytes, expected {entry.bytes}: damaged; {_REMEDY}")


def check_checksums(path: Path, manifest: Manifest, share: int = 0, shares: int = 1) -> None:
    """The content of this rank's share of the files is what was written.

    Args:
        share, shares: check every `shares`-th file, from the `share`-th on.

    Raises:
        UserError: naming the first file whose content differs.
    """
    names = sorted(manifest.files)[share::shares]
    for name, found in hash_files(path / name for name in names).items():
        if found != manifest.files[name]:
            raise UserError(
                f"{path / name}: its SHA-256 is {found.sha256[:12]}..., expected "
                f"{manifest.files[name].sha256[:12]}...: damaged; {_REMEDY}"
            )
