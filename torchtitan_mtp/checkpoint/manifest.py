"""`manifest.json`: what a finished checkpoint consists of, written last and verified on load."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from torchtitan_mtp.checkpoint.checksums import PIECE, FileEntry, check_sizes, remedy
from torchtitan_mtp.checkpoint.metadata import bare_name
from torchtitan_mtp.errors import UserError

NAME = "manifest.json"
FORMAT = 2
FULL = "full"
MODEL_ONLY = "model_only"


@dataclass(frozen=True)
class Manifest:
    """A finished checkpoint: its step, kind ("full" or "model_only"), rank count and files; and
    what no tensor tells (record.py) and the fingerprint of the tokenizer that the weights go with,
    each None where nothing told it or it was written before there was one."""

    step: int
    kind: str
    world_size: int
    files: dict[str, FileEntry]
    record: dict[str, Any] | None = None
    tokenizer: str | None = None


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest into folder `path`."""
    body = {"format": FORMAT, "torch": torch.__version__, "piece": PIECE, **asdict(manifest)}
    with (path / NAME).open("w") as stream:
        json.dump(body | {"sha256": _digest(body)}, stream, indent=1)


def read_manifest(path: Path) -> Manifest | None:
    """The manifest of folder `path`; None where there is none (written by other tools). Error: it
    is damaged, or of a later format; or a file that it lists is missing or has another size."""
    file = path / NAME
    if not file.is_file():
        return None
    try:
        body = json.loads(file.read_text())
        intact = body.pop("sha256") == _digest(body)
        whole = intact and all(map(bare_name, body["files"])) and body["kind"] in (FULL, MODEL_ONLY)
        if whole and body["format"] in (1, FORMAT) and body.get("piece", PIECE) == PIECE:
            listed = body["files"]
            check_sizes(path, {name: entry["bytes"] for name, entry in listed.items()}, NAME)
            if body["format"] == 1:
                _check_whole_files(path, listed)
            files = {n: FileEntry(e["bytes"], e.get("crc32", "")) for n, e in listed.items()}
            told = body.get("record"), body.get("tokenizer")
            return Manifest(body["step"], body["kind"], body["world_size"], files, *told)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: not a manifest ({error}); {remedy(file)}") from error
    if intact:
        raise UserError(f"{file}: format {body['format']}, expected {FORMAT}; update this program")
    raise UserError(f"{file}: its checksum is wrong: damaged; {remedy(file)}")


def _check_whole_files(path: Path, listed: dict[str, Any]) -> None:
    """Error: a file is not what was written, by the SHA-256 of its whole content (format 1)."""
    for name, entry in listed.items():
        digest = hashlib.sha256()
        with (path / name).open("rb") as stream:
            while block := stream.read(PIECE):
                digest.update(block)
        if digest.hexdigest() != entry["sha256"]:
            raise UserError(
                f"{path / name}: its SHA-256 is not the manifest's; {remedy(path / name)}"
            )
