"""Read a DCP folder without trusting it: no code in it runs, no path in it leaves the folder.

DCP reads `.metadata` with `pickle.load` and Python objects in shards with `weights_only=False`;
both run whatever a crafted file asks for. Here `.metadata` passes an allow-list of the classes
that DCP itself writes, objects are loaded with `weights_only=True`, and files are bare names.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from torchtitan_mtp.checkpoint.checksums import FileEntry, check_piece, check_sizes, pieces_of
from torchtitan_mtp.errors import UserError

_DCP_METADATA = {
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
}
_ALLOWED = {
    *(("torch.distributed.checkpoint.metadata", name) for name in _DCP_METADATA),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def bare_name(name: str) -> bool:
    """Whether `name` is a file of the folder itself, not a path that leads elsewhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def read_metadata(path: Path, entry: FileEntry | None = None) -> Metadata:
    """The `.metadata` of a DCP folder, compared with its entry in the manifest, where there is one.

    Error: the file is absent, damaged, holds anything but DCP's own classes, or the folder lacks a
    file that it names or has it shorter than it must be.
    """
    file = path / ".metadata"
    if not file.is_file():
        raise UserError(f"{path}: no .metadata: not a DCP checkpoint, or one that was not finished")
    try:
        if entry is not None:
            for number in pieces_of(0, entry.bytes):
                check_piece(file, entry, number)
        with file.open("rb") as stream:
            metadata = _MetadataUnpickler(io.BytesIO(stream.read())).load()
        if not (isinstance(metadata, Metadata) and _well_formed(metadata)):
            raise TypeError("its fields are not as DCP writes them")
    except UserError:
        raise
    except Exception as error:  # a damaged one raises nearly anything
        raise UserError(f"{file}: not the metadata of a DCP checkpoint: {error}") from error
    _check_files(path, metadata)
    return metadata


def _well_formed(metadata: Metadata) -> bool:
    """Whether the fields have the types that DCP relies on, and sizes that can be. Fields that are
    absent raise what they may."""
    return all(
        isinstance(name, str) and _plausible(entry)
        for name, entry in metadata.state_dict_metadata.items()
    ) and all(
        isinstance(index, MetadataIndex) and _counts((info.offset, info.length))
        for index, info in metadata.storage_data.items()
    )


def _plausible(entry: Any) -> bool:
    if not isinstance(entry, TensorStorageMetadata):
        return isinstance(entry, BytesStorageMetadata)
    chunks = all(
        _counts(chunk.offsets) and _counts(chunk.sizes) and len(chunk.sizes) == len(entry.size)
        for chunk in entry.chunks
    )
    return _counts(entry.size) and chunks and isinstance(entry.properties.dtype, torch.dtype)


def _counts(numbers: Iterable[Any]) -> bool:
    return all(type(number) is int and 0 <= number < 2**63 for number in numbers)


def _check_files(path: Path, metadata: Metadata) -> None:
    """Every file that the metadata names is a bare name, present and long enough."""
    lengths: dict[str, int] = {}
    for info in metadata.storage_data.values():
        if not bare_name(name := getattr(info, "relative_path", "")):
            raise UserError(f"{path / '.metadata'}: names the file {name!r}, expected a bare name")
        lengths[name] = max(lengths.get(name, 0), info.offset + info.length)
    check_sizes(path, lengths, ".metadata", at_least=True)
