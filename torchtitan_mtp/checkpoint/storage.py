"""DCP's writer and reader, for local folders and remote ones, with a checksum of every byte."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint._fsspec_filesystem import FileSystem as FsspecFileSystem
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from torchtitan_mtp.checkpoint.checksums import Checksum, FileEntry, Verifier
from torchtitan_mtp.checkpoint.manifest import Manifest
from torchtitan_mtp.checkpoint.remote import RemotePath
from torchtitan_mtp.errors import UserError


class _Summed:
    """A stream that sums up what is written to it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.sum = stream, Checksum()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, data: Any) -> int:
        self.sum.update(memoryview(data).cast("B"))
        return self._stream.write(data)


class _SumsFiles:
    """Notes the `FileEntry` of every file that is written through it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.entries: dict[str, FileEntry] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:  # type: ignore[misc]
            summed = _Summed(stream)
            yield summed
        self.entries[_name(path)] = summed.sum.entry()

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)  # type: ignore[misc]
        self.entries[_name(new_path)] = self.entries.pop(_name(path))


class _LocalSums(_SumsFiles, FileSystem):
    pass


class _RemoteSums(_SumsFiles, FsspecFileSystem):
    pass


def _name(path: Any) -> str:
    return str(path).rpartition("/")[2]


class SummingWriter(FileSystemWriter):
    """DCP's writer to a folder; afterwards `entries` has what this rank wrote, by file name.

    torch.save's own sums, which torch.load never reads, are left out: so ours cost nothing.
    """

    def __init__(self, folder: Path, **options: Any) -> None:
        remote = isinstance(folder, RemotePath)
        # A store has a file when it is closed; DCP would flush all disks of the machine for it.
        super().__init__(str(folder), **{"sync_files": not remote} | options)
        self.fs: Any = _RemoteSums() if remote else _LocalSums()
        self.path = self.fs.init_path(str(folder))

    def storage_meta(self) -> None:
        """Nothing: DCP would note the path that is written to, which nobody reads."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            return super().write_data(plan, planner)
        finally:
            torch.serialization.set_crc32_options(before)

    @property
    def entries(self) -> dict[str, FileEntry]:
        return dict(self.fs.entries)


class SafeReader(FileSystemReader):
    """DCP's reader over metadata that has been read and checked already.

    With a manifest, every byte is compared with what was written before anything is made of it.
    """

    def __init__(self, folder: Path, metadata: Metadata, manifest: Manifest | None = None) -> None:
        super().__init__(str(folder))
        if isinstance(folder, RemotePath):
            self.fs: Any = FsspecFileSystem()
            self.path = self.fs.init_path(str(folder))
        self._folder, self._checked, self._manifest = folder, metadata, manifest
        self._verifier: Verifier | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._checked.storage_meta is None:
            self._checked.storage_meta = StorageMeta()
        self._checked.storage_meta.load_id = self.load_id
        return self._checked

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what `plan` asks for, in the order of the files."""
        where = {item.storage_index: self.storage_data[item.storage_index] for item in plan.items}

        def order(item: ReadItem) -> tuple[str, int]:
            info = where[item.storage_index]
            return info.relative_path, info.offset

        plan = replace(plan, items=sorted(plan.items, key=order))
        if self._manifest is None:
            return super().read_data(plan, planner)
        infos = [where[item.storage_index] for item in plan.items]
        spans = [(info.relative_path, info.offset, info.length) for info in infos]
        self._verifier = Verifier(self._folder, self._manifest.files, spans)
        try:
            return super().read_data(plan, planner)
        finally:
            self._verifier.close()
            self._verifier = None

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        if self._verifier is not None:
            self._verifier.wait(sinfo.relative_path, sinfo.offset, sinfo.length)
        return super()._slice_file(file, sinfo)


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
