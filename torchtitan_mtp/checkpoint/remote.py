"""Checkpoints in object stores: a folder named by a URL, with what is used here of pathlib."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import IO, Any, cast

from fsspec.core import url_to_fs  # comes with torch

from torchtitan_mtp.errors import UserError


class RemotePath:
    """A file or folder of a file system that fsspec knows: `s3://bucket/run`, `memory://run`.

    It goes for a `pathlib.Path` in this folder: the methods have its meanings and raise OSErrors.
    There is no rename of a folder at one stroke (folders.py says what follows from that). Error: no
    such kind of store, or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self.fs, self.path = url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise UserError(f"{url}: can't be reached through fsspec: {error}") from error

    def __str__(self) -> str:
        return self.url

    __fspath__ = __str__

    def __truediv__(self, name: str | os.PathLike[str]) -> RemotePath:
        return RemotePath(f"{self.url}/{os.fspath(name)}")

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parents(self) -> list[RemotePath]:
        scheme, _, rest = self.url.partition("://")
        above = [str(parent) for parent in PurePosixPath(rest).parents]
        return [RemotePath(f"{scheme}://{parent}") for parent in above if parent != "."]

    def resolve(self) -> RemotePath:
        return self

    def exists(self) -> bool:
        return bool(self.fs.exists(self.path))

    def is_dir(self) -> bool:
        return bool(self.fs.isdir(self.path))

    def is_file(self) -> bool:
        return bool(self.fs.isfile(self.path))

    def stat(self) -> SimpleNamespace:
        return SimpleNamespace(st_size=int(self.fs.size(self.path)))

    def iterdir(self) -> Iterator[RemotePath]:
        self.fs.invalidate_cache()  # other ranks and other jobs write here too
        for found in self.fs.ls(self.path, detail=False):
            yield self / found.rstrip("/").rpartition("/")[2]

    def open(self, mode: str = "r") -> IO[Any]:
        # What is read is read at once: nothing further ahead of it.
        return cast("IO[Any]", self.fs.open(self.path, mode, cache_type="none"))

    def read_text(self, encoding: str = "utf-8") -> str:
        return cast("bytes", self.fs.cat_file(self.path)).decode(encoding)

    def rename(self, target: RemotePath) -> None:
        """A copy and a removal, in most stores."""
        self.fs.mv(self.path, target.path, recursive=True)

    def remove(self) -> None:
        """The file, or the folder with all that is in it; nothing where there is neither."""
        if self.exists():
            self.fs.rm(self.path, recursive=True)


def as_path(path: str | os.PathLike[str]) -> Path:
    """A Path; for a URL, the RemotePath that goes for one."""
    text = os.fspath(path)
    return cast(Path, RemotePath(text)) if "://" in text else Path(text)
