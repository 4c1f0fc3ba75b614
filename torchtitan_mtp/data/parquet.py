"""Parquet files, and the Arrow files that `datasets` saves: a document a row."""

import bisect
import contextlib
import functools
import itertools
import re
from array import array
from collections.abc import Iterator
from typing import Any

from torchtitan_mtp.data.document import Document, to_document
from torchtitan_mtp.data.files import BadRecords, DataFile, not_utf8
from torchtitan_mtp.errors import UserError, import_optional

CACHED_ROW_GROUPS = 4  # of each file
_SCANNED_ROWS = 1024  # at once
_STRINGS = re.compile(r"(dictionary<values=)?((large_)?string|null)")  # of pyarrow's types
_MESSAGES = re.compile(r"(large_)?list<\w+: struct<")


class ParquetFile:
    """Rows of a Parquet file, read by row groups, the last few of which are kept.

    A row group is the least that can be read, and documents are asked for in shuffled order: small
    row groups (about 1,000 rows) make it fast.
    """

    def __init__(self, file: DataFile, text_field: str, bad: BadRecords) -> None:
        missing = f"data {file.shown}: reading it needs pyarrow: pip install pyarrow"
        self._parquet = import_optional("pyarrow.parquet", missing)
        self._arrow = import_optional("pyarrow", missing)
        self._file = file
        self._text_field = text_field
        self._group = functools.lru_cache(CACHED_ROW_GROUPS)(self._read_group)
        self.sizes = array("q")  # of the rows
        with self._told():
            schema, rows = self._layout()
            self._columns = self._find_columns(schema)
            for batch in self._batches():
                for row in range(batch.num_rows):
                    read = functools.partial(self._document, batch, row)
                    self.sizes.append(bad.size_of(read, self.where(len(self.sizes))))
        self._starts = list(itertools.accumulate(rows, initial=0))  # of the row groups

    def where(self, index: int) -> str:
        return f"{self._file.shown}: row {index + 1}"

    def __getitem__(self, index: int) -> Document:
        group = bisect.bisect_right(self._starts, index) - 1
        return self._document(self._group(group), index - self._starts[group])

    def _document(self, rows: Any, row: int) -> Document:
        try:
            cells = {x: rows.column(x)[row].as_py() for x in self._columns}
        except UnicodeDecodeError as e:
            raise ValueError(not_utf8(e)) from e
        return to_document(cells, self._text_field)

    def _find_columns(self, schema: Any) -> list[str]:
        """The columns that make a document, of strings, or messages and tools."""
        names, text = schema.names, self._text_field
        wanted, form = [text], _STRINGS
        if text not in names and {"prompt", "completion"} <= {*names}:
            wanted = ["completion", "prompt"]
        elif text not in names and "messages" in names:
            wanted, form = ["messages"], _MESSAGES
        found = {x: str(schema.field(x).type) for x in wanted if names.count(x) == 1}
        if _MESSAGES.match(found.get(wanted[0], "")):
            return [*wanted, "tools"] if names.count("tools") == 1 else wanted
        if not all(form.match(found.get(x, "")) for x in wanted):
            raise UserError(
                f"data {self._file.shown}: expected one column of strings {text!r}, or 'prompt' and"
                " 'completion', or a list of objects in 'messages'; found"
                f" {found or sorted(names)}"
            )
        return wanted

    def _layout(self) -> tuple[Any, list[int]]:
        """The schema, and how many rows each row group has."""
        with self._opened() as parquet:
            meta = parquet.metadata
            rows = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
            return parquet.schema_arrow, rows

    def _batches(self) -> Iterator[Any]:
        with self._opened() as parquet:
            yield from parquet.iter_batches(_SCANNED_ROWS, columns=self._columns)

    def _read_group(self, group: int) -> Any:
        self._file.read(0, 0)  # says so if it has changed
        with self._told(), self._opened() as parquet:
            return parquet.read_row_group(group, columns=self._columns)  # a pyarrow.Table

    def _opened(self) -> Any:
        return self._parquet.ParquetFile(self._file.path, pre_buffer=False)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, self._arrow.ArrowException) as e:
            found = f"not a readable Parquet file or Arrow stream: {e}"
            raise UserError(f"data {self._file.shown}: {found}") from e


class ArrowFile(ParquetFile):
    """Rows of an Arrow stream, whose record batches (1,000 rows, as `datasets` saves) are what row
    groups are to a Parquet file. Read, not mapped, as every file."""

    def _layout(self) -> tuple[Any, list[int]]:
        with self._opened() as file:
            reader = self._arrow.ipc.open_stream(file)
            self._schema, self._offsets, rows = reader.schema, [file.tell()], []
            for batch in reader:
                rows.append(batch.num_rows)
                self._offsets.append(file.tell())
        return self._schema, rows

    def _batches(self) -> Iterator[Any]:
        return map(self._read_group, range(len(self._offsets) - 1))

    def _read_group(self, group: int) -> Any:
        ipc = self._arrow.ipc
        self._file.read(0, 0)  # says so if it has changed
        with self._told(), self._opened() as file:
            file.seek(self._offsets[group])
            batch = ipc.read_record_batch(ipc.read_message(file), self._schema)
            return batch.select(self._columns)

    def _opened(self) -> Any:
        return self._arrow.OSFile(str(self._file.path))
