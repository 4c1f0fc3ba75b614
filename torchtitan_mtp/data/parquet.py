"""Parquet files: a document a row."""

import bisect
import contextlib
import functools
import itertools
import re
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

from torchtitan_mtp.data.document import SKIPPED, Document, to_document
from torchtitan_mtp.data.files import BadRecords, DataFile
from torchtitan_mtp.errors import UserError, import_optional

CACHED_ROW_GROUPS = 4  # of each file
_SCANNED_ROWS = 1024  # at once
_STRINGS = re.compile(r"(dictionary<values=)?((large_)?string|null)")  # of pyarrow's types


class ParquetFile:
    """Rows of a Parquet file, read by row groups, the last few of which are kept.

    A row group is the least that can be read, and documents are asked for in shuffled order: small
    row groups (about 1,000 rows) make it fast.
    """

    def __init__(self, file: DataFile, text_field: str, bad: BadRecords) -> None:
        missing = f"data {file.shown}: reading it needs pyarrow: pip install pyarrow"
        self._parquet = import_optional("pyarrow.parquet", missing)
        self._file = file
        self._text_field = text_field
        self._group = functools.lru_cache(CACHED_ROW_GROUPS)(self._read_group)
        self.sizes = array("q")  # of the rows
        with self._opened() as parquet:
            self._columns = self._find_columns(parquet.schema_arrow)
            meta = parquet.metadata
            rows = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
            self._scan(parquet.iter_batches(_SCANNED_ROWS, columns=self._columns), bad)
        self._starts = list(itertools.accumulate(rows, initial=0))  # of the row groups

    def where(self, index: int) -> str:
        return f"{self._file.shown}: row {index + 1}"

    def __getitem__(self, index: int) -> Document:
        group = bisect.bisect_right(self._starts, index) - 1
        table = self._group(group)
        cells = {x: table.column(x)[index - self._starts[group]].as_py() for x in self._columns}
        return to_document(cells, self._text_field)

    def _scan(self, batches: Iterable[Any], bad: BadRecords) -> None:
        from pyarrow import large_binary, large_string

        for batch in batches:
            # Dictionaries become their values; as bytes, for nobody has checked that it is UTF-8.
            columns = [x.cast(large_string()).cast(large_binary()) for x in batch.columns]
            for cells in zip(*(x.to_pylist() for x in columns), strict=True):
                row, found = len(self.sizes), ", ".join(filter(None, map(_fault, cells)))
                if found:
                    bad.add(self.where(row), f"expected text in {self._columns}, found {found}")
                self.sizes.append(SKIPPED if found else sum(map(len, cells)))

    def _find_columns(self, schema: Any) -> list[str]:
        """The columns that make a document, in the order of `Document`."""
        wanted = [self._text_field]
        if self._text_field not in schema.names and {"prompt", "completion"} <= {*schema.names}:
            wanted = ["completion", "prompt"]
        found = {x: str(schema.field(x).type) for x in wanted if schema.names.count(x) == 1}
        texts = [x for x in found.values() if _STRINGS.match(x)]
        if len(texts) < len(wanted):
            raise UserError(
                f"data {self._file.shown}: expected one column of strings {self._text_field!r}, or"
                f" 'prompt' and 'completion'; found {found or sorted(schema.names)}"
            )
        return wanted

    def _read_group(self, group: int) -> Any:
        self._file.read(0, 0)  # says so if it has changed
        with self._opened() as parquet:
            return parquet.read_row_group(group, columns=self._columns)  # a pyarrow.Table

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        from pyarrow import ArrowException

        try:
            with self._parquet.ParquetFile(self._file.path, pre_buffer=False) as parquet:
                yield parquet
        except (OSError, ArrowException) as e:
            raise UserError(f"data {self._file.shown}: not a readable Parquet file: {e}") from e


def _fault(cell: bytes | None) -> str:
    if cell is None:
        return "null"
    try:
        cell.decode("utf-8")
    except UnicodeDecodeError as e:
        return f"byte {cell[e.start]:#04x}, which is not UTF-8"
    return ""
