"""Text files and files with one JSON record a line: documents that are spans of bytes."""

import codecs
import functools
import json
from array import array
from collections.abc import Callable

from torchtitan_mtp.data.document import SKIPPED, Document, document_of
from torchtitan_mtp.data.files import BadRecords, DataFile
from torchtitan_mtp.errors import UserError

MAX_CHARACTERS = 64 << 10


class Spans:
    """Documents that are spans of bytes of one file.

    Args:
        file: whose bytes.
        parse: a span's document. Raises ValueError if it is none.
    """

    def __init__(self, file: DataFile, parse: Callable[[bytes], Document]) -> None:
        self._file, self.parse = file, parse
        self._starts, self._stops, self.sizes = array("q"), array("q"), array("q")

    def add(self, start: int, stop: int, size: int) -> None:
        """The next document: bytes start..stop-1 of the file, and the size of its text; SKIPPED of
        a record that is none, which keeps its number."""
        self._starts.append(start)
        self._stops.append(stop)
        self.sizes.append(size)

    def __getitem__(self, index: int) -> Document:
        try:
            return self.parse(self._file.read(self._starts[index], self._stops[index]))
        except ValueError as e:  # it was one when the file was scanned
            raise UserError(f"data {self.where(index)}: changed under the run: {e}") from e

    def where(self, index: int) -> str:
        return f"{self._file.shown}:{self._file.line_number(self._starts[index])}"


def find_records(file: DataFile, text_field: str, bad: BadRecords) -> Spans:
    """A document a line that is not blank; all lines are parsed once, to know that they can be."""
    spans, offset = Spans(file, functools.partial(_parse_record, text_field=text_field)), 0
    with open(file.path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.isspace():
                size = SKIPPED
                try:
                    size = sum(len(x.encode()) for x in spans.parse(line))
                except ValueError as e:
                    bad.add(f"{file.shown}:{number}", str(e))
                spans.add(offset, offset + len(line), size)
            offset += len(line)
    return spans


def _parse_record(line: bytes, text_field: str) -> Document:
    """Raises ValueError, saying what was found, unless the line is a record."""
    try:
        record = json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except UnicodeDecodeError as e:
        byte = e.object[e.start]
        raise ValueError(f"byte {byte:#04x} is not UTF-8 (iconv -t utf-8 converts it)") from e
    except (ValueError, RecursionError) as e:
        raise ValueError(f"not JSON: {e}; every line must be one record") from e
    if document := document_of(record, text_field):
        return document
    found = type(record).__name__
    if isinstance(record, dict):
        found = str({x: type(record[x]).__name__ for x in record})[:200]
    raise ValueError(
        f"expected an object with a string {text_field!r}, or strings 'prompt' and 'completion';"
        f" found {found}"
    )


def find_texts(file: DataFile, bad: BadRecords) -> Spans:
    """One UTF-8 text file: one document, or, beyond 64 Ki characters, several.

    A long file is cut after the last line end within each 64 Ki characters (in the middle of a
    line longer than that), so that one big file can be shuffled and partly held out. An empty file
    is no document. Of one with a byte that is not UTF-8 all are skipped: as many as there are once
    each such byte is a character.
    """
    spans, start = Spans(file, lambda data: Document(data.decode("utf-8"))), 0
    errors = "strict"
    while start < file.size:
        # A character takes 1 to 4 bytes, so this holds 64 Ki of them or reaches the file's end.
        data = file.read(start, min(start + 4 * MAX_CHARACTERS, file.size))
        at_end = start + len(data) == file.size
        try:
            # Leaves out the character that the end of the data cuts in two, if it does.
            text = codecs.getincrementaldecoder("utf-8")(errors).decode(data, final=at_end)
        except UnicodeDecodeError as e:
            byte, where = data[e.start], f"{file.shown}:{file.line_number(start + e.start)}"
            bad.add(where, f"byte {byte:#04x} is not UTF-8 (iconv -t utf-8 converts it)")
            errors = "surrogateescape"
            continue
        if len(text) > MAX_CHARACTERS or not at_end:
            text = text[:MAX_CHARACTERS]
            text = text[: text.rfind("\n") + 1] or text
        size = len(text.encode("utf-8", errors))
        spans.add(start, start + size, size)
        start += size
    if errors != "strict":
        spans.sizes = array("q", [SKIPPED]) * len(spans.sizes)
    return spans
