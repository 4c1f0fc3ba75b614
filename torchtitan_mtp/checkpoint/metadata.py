"""Read a DCP folder without trusting it: no code in it runs, no path in it leaves the folder.

DCP reads `.metadata` with `pickle.load` and Python objects in shards with `weights_only=False`;
both run whatever a crafted file asks for. Here `.metadata` passes an allow-list of the classes
that DCP itself writes, objects are loaded with `weights_only=True`, and files are bare names.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

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


def read_metadata(path: Path) -> Metadata:
    """The `.metadata` of a DCP folder, checked.

    Raises:
        UserError: the file is absent, damaged, holds anything but DCP's own classes, or the
            folder lacks a file that it names or has it shorter than it must be.
    """
    file = path / ".metadata"
    if not file.is_file():
        raise UserError(f"{path}: no .metadata: not a DCP checkpoint, or one that was not finished")
    try:
        with file.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{file}: not the metadata of a DCP checkpoint: {error}") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise UserError(f"{file}: not the metadata of a DCP checkpoint")
    _check_files(path, metadata)
    return metadata


def _check_files(path: Path, metadata: Metadata) -> None:
    """Every file that the metadata names is a bare name, present and long enough."""
    lengths: dict[str, int] = {}
    for info in metadata.storage_data.values():
        if not bare_name(getattr(info, "relative_path", "")):
            raise UserError(
                f"{path / '.metadata'}: names the file {info.relative_path!r}, expected a bare name"
            )
        if not (isinstance(info.offset, int) and isinstance(info.length, int)):
            raise UserError(f"{path / '.metadata'}: not the metadata of a DCP checkpoint")
        end = info.offset + info.length
        lengths[info.relative_path] = max(lengths.get(info.relative_path, 0), end)
    for name, length in lengths.items():
        file = path / name
        if not file.is_file():
            raise UserError(
                f"{file}: missing, but .metadata names it; restore it or load another step"
            )
        if file.stat().st_size < length:
            raise UserError(
                f"{file}: {file.stat().st_size} bytes, expected at least {length}: truncated; "
                "restore it, or load another step (checkpoint.load_step)"
            )


class SafeReader(FileSystemReader):
    """DCP's reader over metadata that has been read and checked already."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._checked = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._checked.storage_meta is None:
            self._checked.storage_meta = StorageMeta()
        self._checked.storage_meta.load_id = self.load_id
        return self._checked


class SafeLoadPlanner(DefaultLoadPlanner):
    """DCP's planner for flat state dicts, whose Python objects may hold plain data only."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            self.state_dict[name] = torch.load(value, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{name}: the checkpoint holds more than plain data: refused"
            ) from error
