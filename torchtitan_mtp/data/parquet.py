"""Parquet files: a document a row."""

import bisect
import itertools
import threading
from collections import OrderedDict
from typing import Any

import numpy as np

from torchtitan_mtp.data.document import Document, document_of
from torchtitan_mtp.data.files import DataFile
from torchtitan_mtp.errors import UserError

CACHED_ROW_GROUPS = 4  # of each file


class ParquetFile:
    """Rows of a Parquet file, read by row groups, the last few of which are kept.

    A row group is the least that can be read, and documents are asked for in shuffled order: small
    row groups (about 1,000 rows) make it fast.
    """

    def __init__(self, file: DataFile, text_field: str) -> None:
        try:
            import pyarrow.parquet
        except ImportError as e:
            raise UserError(
                f"data {file.shown}: reading it needs pyarrow: pip install pyarrow"
            ) from e
        self._open = pyarrow.parquet.ParquetFile
        self._errors = (OSError, pyarrow.ArrowException)
        self._file = file
        self._text_field = text_field
        try:
            with self._open(file.path) as parquet:
                names = set(parquet.schema_arrow.names)
                meta = parquet.metadata
                groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
                rows = [group.num_rows for group in groups]
                self._bytes = np.array([group.total_byte_size for group in groups], np.int64)
        except self._errors as e:
            raise self._unreadable(e) from e
        pair = {"prompt", "completion"}
        if text_field not in names and not pair <= names:
            raise UserError(
                f"data {file.shown}: expected a column {text_field!r}, or 'prompt' and"
                f" 'completion'; found {sorted(names)}"
            )
        self._columns = [text_field] if text_field in names else sorted(pair)
        self._starts = list(itertools.accumulate(rows, initial=0))
        self._groups: OrderedDict[int, Any] = OrderedDict()  # row group -> pyarrow.Table
        self._lock = threading.Lock()  # two loaders' threads may read one source

    def __len__(self) -> int:
        return self._starts[-1]

    def where(self, index: int) -> str:
        return f"{self._file.shown}: row {index + 1}"

    def sizes(self) -> np.ndarray:
        rows = np.diff(self._starts)
        return np.repeat(self._bytes // np.maximum(rows, 1), rows)

    def __getitem__(self, index: int) -> Document:
        group = bisect.bisect_right(self._starts, index) - 1
        table = self._group(group)
        row = index - self._starts[group]
        record = {name: table.column(name)[row].as_py() for name in self._columns}
        document = document_of(record, self._text_field)
        if document is None:
            raise UserError(
                f"data {self.where(index)}: expected text in {self._columns}, found"
                f" {[type(value).__name__ for value in record.values()]}"
            )
        return document

    def _group(self, group: int) -> Any:
        with self._lock:
            if group not in self._groups:
                self._file.read(0, 0)  # says so if the size has changed
                try:
                    with self._open(self._file.path) as parquet:
                        self._groups[group] = parquet.read_row_group(group, columns=self._columns)
                except self._errors as e:
                    raise self._unreadable(e) from e
                if len(self._groups) > CACHED_ROW_GROUPS:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(group)
            return self._groups[group]

    def _unreadable(self, error: Exception) -> UserError:
        return UserError(
            f"data {self._file.shown}: not a readable Parquet file: {' '.join(str(error).split())}"
        )
