"""DCP's writer and reader, for local folders and remote ones, with a checksum of every byte."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint._fsspec_filesystem import FileSystem as FsspecFileSystem
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture
from torch.utils.serialization import config

from torchtitan_mtp.checkpoint.checksums import FileEntry, SummedStream, check_piece, pieces_of
from torchtitan_mtp.checkpoint.remote import RemotePath
from torchtitan_mtp.errors import UserError

_THREADS = min(8, os.cpu_count() or 1)


class _SummingFiles:
    """DCP's access to files; the `FileEntry` of every file written is noted in `entries`."""

    def __init__(self, files: Any, entries: dict[str, FileEntry]) -> None:
        self._files, self._entries = files, entries

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with self._files.create_stream(path, mode) as stream:
            summed = SummedStream(stream)
            yield summed
        self._entries[os.path.basename(path)] = summed.entry()

    def rename(self, path: Any, new_path: Any) -> None:
        self._files.rename(path, new_path)
        self._entries[os.path.basename(new_path)] = self._entries.pop(os.path.basename(path))


class SummingWriter(FileSystemWriter):
    """DCP's writer to a folder; afterwards `entries` has what this rank wrote, by file name.

    torch.save's own sums, which torch.load never reads, are left out: so ours cost nothing.
    """

    def __init__(self, folder: Path, **options: Any) -> None:
        remote = isinstance(folder, RemotePath)
        # A store has a file when it is closed; DCP would flush all disks of the machine for it.
        super().__init__(str(folder), **{"sync_files": not remote} | options)
        self.entries: dict[str, FileEntry] = {}
        self.fs: Any = _SummingFiles(FsspecFileSystem() if remote else FileSystem(), self.entries)
        self.path = self.fs.init_path(str(folder))

    def storage_meta(self) -> None:
        """Nothing: DCP would note the path that is written to, which nobody reads."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        with config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
            return super().write_data(plan, planner)


class SafeReader(FileSystemReader):
    """DCP's reader over metadata that has been read and checked already.

    With sums of its files, every byte is compared before anything is made of it.
    """

    def __init__(self, folder: Path, metadata: Metadata, sums: dict[str, FileEntry]) -> None:
        super().__init__(str(folder))
        if isinstance(folder, RemotePath):
            self.fs: Any = FsspecFileSystem()
            self.path = self.fs.init_path(str(folder))
        self._folder, self._checked, self._sums = folder, metadata, sums
        self._checks: dict[tuple[str, int], Future[None]] = {}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._checked

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> TorchFuture[None]:
        """Read what `plan` asks for, in the order of the files; threads check some way ahead."""

        def span(item: ReadItem) -> tuple[str, int, int]:
            info = self.storage_data[item.storage_index]
            return info.relative_path, info.offset, info.length

        plan = replace(plan, items=sorted(plan.items, key=span))
        spans = map(span, plan.items if self._sums else ())
        pieces = {(name, n): self._sums[name] for name, *at in spans for n in pieces_of(*at)}
        pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="checksums")
        self._checks = {
            (name, number): pool.submit(check_piece, self._folder / name, entry, number)
            for (name, number), entry in pieces.items()
        }
        try:
            return super().read_data(plan, planner)
        finally:
            pool.shutdown(cancel_futures=True)

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        for number in pieces_of(sinfo.offset, sinfo.length) if self._sums else ():
            self._checks[sinfo.relative_path, number].result()
        return super()._slice_file(file, sinfo)


class SafeLoadPlanner(DefaultLoadPlanner):
    """DCP's planner for flat state dicts, whose Python objects may hold plain data only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            self.state_dict[name] = torch.load(value, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{name}: the checkpoint holds more than plain data: refused"
            ) from error
