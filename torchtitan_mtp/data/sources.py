"""From a dataset's name and path to documents."""

import bisect
import glob
import itertools
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from torchtitan_mtp.data.document import Document, Source, StreamSource
from torchtitan_mtp.data.files import fingerprint_files
from torchtitan_mtp.data.text import TextFile
from torchtitan_mtp.errors import UserError

STDLIB = "python_stdlib"
# What is read of a folder; a file named itself, or matched by a glob, is text whatever its suffix.
TEXT_SUFFIXES = frozenset(
    [
        ".txt",
        ".text",
        ".md",
        ".rst",
        ".tex",
        ".py",
        ".pyi",
        ".c",
        ".h",
        ".cc",
        ".cpp",
        ".hpp",
        ".cu",
        ".java",
        ".js",
        ".ts",
        ".go",
        ".rs",
        ".rb",
        ".sh",
        ".sql",
        ".html",
        ".xml",
        ".css",
        ".toml",
        ".yaml",
        ".yml",
    ]
)
SKIPPED_OF_STDLIB = frozenset(
    ["test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"]
)


class FilesSource:
    """The documents of a list of files, file after file."""

    def __init__(self, name: str, root: Path, paths: Sequence[Path]) -> None:
        self.name = name
        self._files = [TextFile(path) for path in paths]
        self._starts = list(itertools.accumulate((len(f) for f in self._files), initial=0))
        if not len(self):
            raise UserError(f"dataset {name}: {len(paths)} files, but no document in them")
        self.fingerprint = fingerprint_files(root, paths)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = bisect.bisect_right(self._starts, index) - 1  # skips files without documents
        return self._files[file][index - self._starts[file]]


def build_source(dataset: str, dataset_path: str | None = None) -> Source | StreamSource:
    """The documents that `dataset` names.

    Args:
        dataset: "python_stdlib" (the running interpreter's standard library, without its tests);
            with a path, any name.
        dataset_path: a file, a folder (read recursively) or a glob.

    Raises:
        UserError: unknown name, nothing at the path, unreadable or empty files.
    """
    if dataset_path:
        root, paths = _find_files(dataset, dataset_path)
        return FilesSource(dataset, root, paths)
    if dataset == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        return FilesSource(dataset, root, _stdlib_files(root))
    raise UserError(f"dataset {dataset}: unknown; give {STDLIB}, or a training.dataset_path")


def _stdlib_files(root: Path) -> list[Path]:
    files = [
        path
        for path in root.rglob("*.py")
        if not SKIPPED_OF_STDLIB.intersection(path.relative_to(root).parts)
    ]
    if not files:
        raise UserError(
            f"dataset {STDLIB}: no .py file below {root}; give training.dataset_path a text file"
            " or folder"
        )
    return sorted(files)


def _find_files(dataset: str, pattern: str) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the sorted files."""
    place = Path(pattern).expanduser()
    if place.is_file():
        return place.parent, [place]
    if place.is_dir():
        files = [p for p in place.rglob("*") if p.suffix.lower() in TEXT_SUFFIXES and p.is_file()]
        if not files:
            raise UserError(f"dataset {dataset}: folder {pattern} holds no file of a known kind")
        return place, sorted(files)
    files = [Path(p) for p in glob.glob(str(place), recursive=True) if os.path.isfile(p)]
    if not files:
        raise UserError(
            f"dataset {dataset}: dataset_path {pattern} names no file, folder or glob with files"
        )
    root = Path(os.path.commonpath([p.parent for p in files]))
    return root, sorted(files)
