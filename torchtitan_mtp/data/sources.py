"""From a dataset's name and path to documents."""

import bisect
import itertools
import logging
import os
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan_mtp.data import compressed
from torchtitan_mtp.data.document import SKIPPED, Document
from torchtitan_mtp.data.files import BadRecords, DataFile, fingerprint_files
from torchtitan_mtp.data.folders import RECORDS, find_files
from torchtitan_mtp.data.hub import DATASETS, StreamSource
from torchtitan_mtp.data.parquet import ArrowFile, ParquetFile
from torchtitan_mtp.data.spans import Spans, find_records, find_texts
from torchtitan_mtp.errors import UserError

logger = logging.getLogger(__name__)

STDLIB = "python_stdlib"
SKIPPED_OF_STDLIB = frozenset(
    ["test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"]
)


class Source:
    """The documents of a list of files, file after file, all of which are read once to check them;
    in any order, the same at every run. A bad record that is skipped keeps its number, without
    text.

    Attributes:
        name: for messages.
        fingerprint: equal for two sources with the same documents in the same order.
        bad_records: what is done about them, "stop" or "skip".
        has_conversations: some document is one, and needs a chat template.

    Raises:
        UserError: a file or record that can't be read, or no document in any.
    """

    def __init__(
        self, name: str, root: Path, paths: Sequence[Path], field: str, bad_records: str, also: str
    ) -> None:
        """`paths` in order, named relative to `root` in the fingerprint; `also` is logged."""
        self.name, self.bad_records = name, bad_records
        bad = BadRecords(bad_records)
        self._files = [_open_file(path, field, bad) for path in paths]
        self._starts = list(itertools.accumulate((len(f.sizes) for f in self._files), initial=0))
        self.fingerprint = f"{fingerprint_files(root, paths)}:{field}"
        if bad.count:
            self.fingerprint += f":{bad.count} skipped"
            told = "dataset %s: %d bad record(s) skipped, the first %s"
            logger.warning(told, name, bad.count, bad.first)
        self.has_conversations = bad.has_conversations
        sizes = self.sizes()
        sizes = sizes[sizes != SKIPPED]
        if not sizes.size:
            raise UserError(
                f"dataset {name}: no document in {len(paths)} file(s), {[*paths, root][0]} ...;"
                " expected at least one that is not empty"
            )
        told = f"{len(paths):,} file(s), {len(sizes):,} documents, {sizes.sum():,} bytes of text"
        logger.info("dataset %s: %s%s", name, told, also)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Document:
        file, number = self._place(index)
        try:
            return Document("") if file.sizes[number] == SKIPPED else file[number]
        except ValueError as e:  # it was one when the file was scanned
            raise UserError(f"data {file.where(number)}: changed under the run: {e}") from e

    def where(self, index: int) -> str:
        """The document's file and line, or row, for messages."""
        file, number = self._place(index)
        return file.where(number)

    def _place(self, index: int) -> tuple[Spans | ParquetFile, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = bisect.bisect_right(self._starts, index) - 1  # passes files without documents
        return self._files[file], index - self._starts[file]

    def sizes(self) -> np.ndarray:
        """UTF-8 bytes of each document's text and prompt, or of its conversation, or SKIPPED, int64
        [documents]."""
        return np.concatenate([file.sizes for file in self._files])


def build_source(
    dataset: str,
    dataset_path: str | None = None,
    *,
    text_field: str = "text",
    bad_records: str = "stop",
    split: str = "train",
    outputs: Iterable[Path] = (),
    key: str = "training.dataset_path",
) -> Source | StreamSource:
    """The documents that `dataset` names.

    Args:
        dataset: "python_stdlib" (the running interpreter's standard library without its tests);
            c4, c4_validation, fineweb or "org/name" (streamed from the Hugging Face hub); or,
            with a path, any name.
        dataset_path: a file, a folder (read recursively) or a glob. Suffixes decide: .jsonl
            .ndjson .json (a record a line), .parquet, .arrow, else UTF-8 text; .gz and .zst of
            those but .arrow.
        text_field: of a record, what holds its text or messages.
        bad_records: "stop" at the first record that is none, or "skip" and count them.
        split: which of a folder's files; see `find_files`.
        outputs: what this run writes: no data.
        key: what gives a path, for messages.

    Raises:
        UserError: unknown name, nothing at the path, unreadable or empty files, no network.
    """
    if dataset_path:
        written = {os.path.realpath(path) for path in outputs}
        try:
            root, paths, left_out = find_files(dataset_path, split, written, key)
        except OSError as e:
            raise UserError(f"data {e.filename}: can't be read: {e.strerror}") from e
        return Source(dataset, root, paths, text_field, bad_records, left_out)
    if dataset == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        return Source(dataset, root, _stdlib_files(root), "text", bad_records, "")
    if dataset in DATASETS or dataset.count("/") == 1:
        return StreamSource(dataset, text_field, bad_records=bad_records)
    raise UserError(
        f"dataset {dataset!r} is not a dataset here; give the path of a file, folder or glob as"
        f" {key}, or name one of {', '.join([STDLIB, *DATASETS])} or org/name on the hub"
    )


def find_source(name: str, **options: Any) -> Source | StreamSource:
    """The documents of a dataset that is named, or of a file, folder or glob: `build_source`."""
    return build_source(name, name if is_path(name) else None, **options)


def is_path(name: str) -> bool:
    """Whether a file, folder or glob is meant, and no dataset."""
    spelled = name.startswith(("/", "./", "../")) or any(c in name for c in "*?[")
    return spelled or Path(name).exists()


def _open_file(path: Path, text_field: str, bad: BadRecords) -> Spans | ParquetFile:
    file, kind = DataFile(path), compressed.uncompressed_name(path)
    if path.name.lower() != kind:
        file = DataFile(compressed.decompress(path), shown=path)
    if kind.endswith(RECORDS):
        return find_records(file, text_field, bad)
    if kind.endswith(".parquet"):
        return ParquetFile(file, text_field, bad)
    if kind.endswith(".arrow"):
        return ArrowFile(file, text_field, bad)
    return find_texts(file, bad)


def _stdlib_files(root: Path) -> list[Path]:
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_OF_STDLIB]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files)
