"""From a dataset's name and path to documents."""

import bisect
import glob
import itertools
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from torchtitan_mtp.data import compressed
from torchtitan_mtp.data.document import Document, Source, StreamSource
from torchtitan_mtp.data.files import DataFile, fingerprint_files
from torchtitan_mtp.data.hub import DATASETS, HubStream
from torchtitan_mtp.data.jsonl import JsonlFile
from torchtitan_mtp.data.parquet import ParquetFile
from torchtitan_mtp.data.text import TextFile
from torchtitan_mtp.errors import UserError

STDLIB = "python_stdlib"
# What is read of a folder. A file that is named itself, or by a glob, may have any suffix: it is
# text if it has none of RECORDS or .parquet.
RECORDS = (".jsonl", ".ndjson", ".json")
FOLDER_SUFFIXES = frozenset(
    """.jsonl .ndjson .jsonl.gz .ndjson.gz .json.gz .jsonl.zst .ndjson.zst .json.zst .parquet
    .txt .text .txt.gz .txt.zst .md .rst .tex .html .xml .css .toml .yaml .yml .sql .sh
    .py .pyi .c .h .cc .cpp .hpp .cu .java .js .ts .go .rs .rb""".split()  # noqa: SIM905
)
SKIPPED_OF_STDLIB = frozenset(
    ["test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"]
)


class FilesSource:
    """The documents of a list of files, file after file.

    Args:
        name: for messages.
        root: folder that the fingerprint's file names are relative to.
        paths: the files, in order.
        text_field: of a record, what holds its text.
        cache_dir: for the contents of compressed files; None: below the temporary folder.

    Raises:
        UserError: a file that can't be read, or no document in any.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        paths: Sequence[Path],
        text_field: str = "text",
        cache_dir: Path | None = None,
    ) -> None:
        self.name = name
        self._files = [_open_file(path, text_field, cache_dir) for path in paths]
        self._starts = list(itertools.accumulate((len(f) for f in self._files), initial=0))
        if not len(self):
            raise UserError(
                f"dataset {name}: no document in {len(paths)} file(s), {paths[0]} ...; expected"
                " at least one that is not empty"
            )
        self.fingerprint = f"{fingerprint_files(root, paths)}:{text_field}"

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Document:
        file, number = self._place(index)
        return file[number]

    def where(self, index: int) -> str:
        """The document's file and line, or row."""
        file, number = self._place(index)
        return file.where(number)

    def _place(self, index: int) -> tuple[TextFile | JsonlFile | ParquetFile, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = bisect.bisect_right(self._starts, index) - 1  # passes files without documents
        return self._files[file], index - self._starts[file]

    def sizes(self) -> np.ndarray:
        """Bytes of each document's text and prompt as UTF-8, int64 [documents]."""
        return np.concatenate([file.sizes() for file in self._files])


def build_source(
    dataset: str,
    dataset_path: str | None = None,
    *,
    text_field: str = "text",
    cache_dir: str | None = None,
) -> Source | StreamSource:
    """The documents that `dataset` names.

    Args:
        dataset: "python_stdlib" (the running interpreter's standard library without its tests);
            c4, c4_validation, fineweb or "org/name" (streamed from the Hugging Face hub); or,
            with a path, any name.
        dataset_path: a file, a folder (read recursively) or a glob. Suffixes decide: .jsonl
            .ndjson .json (a record a line), .parquet, else UTF-8 text; .gz and .zst of those.
        text_field: of a record, what holds its text.
        cache_dir: for the contents of compressed files; None: below the temporary folder.

    Raises:
        UserError: unknown name, nothing at the path, unreadable or empty files, no network.
    """
    if dataset_path:
        root, paths = _find_files(dataset, dataset_path)
        cache = Path(cache_dir) if cache_dir else None
        return FilesSource(dataset, root, paths, text_field, cache)
    if dataset == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        return FilesSource(dataset, root, _stdlib_files(root))
    if dataset in DATASETS or dataset.count("/") == 1:
        return HubStream(dataset, text_field)
    raise UserError(
        f"training.dataset: {dataset!r} is not a dataset here; give training.dataset_path a file,"
        f" folder or glob, or name one of {', '.join([STDLIB, *DATASETS])} or org/name on the hub"
    )


def _open_file(
    path: Path, text_field: str, cache_dir: Path | None
) -> TextFile | JsonlFile | ParquetFile:
    file, kind = DataFile(path), path.name.lower()
    if kind.endswith(compressed.SUFFIXES):
        file = DataFile(compressed.decompressed(path, cache_dir), shown=path)
        kind = kind.rsplit(".", 1)[0]
    if kind.endswith(RECORDS):
        return JsonlFile(file, text_field)
    return ParquetFile(file, text_field) if kind.endswith(".parquet") else TextFile(file)


def _stdlib_files(root: Path) -> list[Path]:
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_OF_STDLIB]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise UserError(
            f"dataset {STDLIB}: no .py file below {root}; give training.dataset_path a text file"
            " or folder"
        )
    return sorted(files)


def _find_files(dataset: str, pattern: str) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files, sorted."""
    place = Path(pattern)
    if place.is_file():
        return place.parent, [place]
    if place.is_dir():
        files = [path for path in place.rglob("*") if _read_of_a_folder(path) and path.is_file()]
        if not files:
            raise UserError(
                f"dataset {dataset}: no text, .jsonl or .parquet file below {pattern}; name files"
                f" of other kinds by a glob, {pattern.rstrip('/')}/**/*.SUFFIX"
            )
        return place, sorted(files)
    files = [Path(p) for p in glob.glob(str(place), recursive=True) if os.path.isfile(p)]
    if not files:
        raise UserError(
            f"dataset {dataset}: no file, folder or glob match at training.dataset_path {pattern!r}"
        )
    return Path(os.path.commonpath([path.parent for path in files])), sorted(files)


def _read_of_a_folder(path: Path) -> bool:
    suffixes = path.suffixes
    return any("".join(suffixes[-k:]).lower() in FOLDER_SUFFIXES for k in (1, 2))
