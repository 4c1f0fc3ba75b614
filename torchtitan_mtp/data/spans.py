"""Text files and files with one JSON record a line: documents that are spans of bytes."""

import codecs
import functools
import itertools
import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torchtitan_mtp.data.document import SKIPPED, Document, to_document
from torchtitan_mtp.data.files import BadRecords, DataFile, not_utf8

MAX_CHARACTERS = 64 << 10


@dataclass(frozen=True, eq=False)
class Spans:
    """Documents that are spans of bytes of one file."""

    file: DataFile
    parse: Callable[[bytes], Document]  # raises ValueError for a span that is no document
    starts: Sequence[int]  # of each span, and the end of the last
    sizes: Sequence[int]  # SKIPPED of a record that is no document, which keeps its number

    def __getitem__(self, index: int) -> Document:
        return self.parse(self.file.read(self.starts[index], self.starts[index + 1]))

    def where(self, index: int) -> str:
        return f"{self.file.shown}:{self.file.line_number(self.starts[index])}"


def find_records(file: DataFile, text_field: str, bad: BadRecords) -> Spans:
    """A document a line that is not blank; all lines are parsed once, to know that they can be."""
    parse = functools.partial(_parse_record, text_field=text_field)
    starts, sizes, offset = array("q"), array("q"), 0
    with open(file.path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.isspace():
                starts.append(offset)
                read = functools.partial(parse, line)
                sizes.append(bad.size_of(read, f"{file.shown}:{number}"))
            offset += len(line)
    starts.append(offset)
    return Spans(file, parse, starts, sizes)


def _parse_record(line: bytes, text_field: str) -> Document:
    """Of a line; blank ones may follow. Raises ValueError, saying what was found, if it is none."""
    try:
        record = json.loads(line.split(b"\n")[0].removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except UnicodeDecodeError as e:
        raise ValueError(not_utf8(e)) from e
    except (ValueError, RecursionError) as e:
        raise ValueError(f"not JSON: {e}; every line must be one record") from e
    return to_document(record, text_field)


def find_texts(file: DataFile, bad: BadRecords) -> Spans:
    """One UTF-8 text file: one document, or, beyond 64 Ki characters, several.

    A long file is cut after the last line end within each 64 Ki characters (in the middle of a
    line longer than that), so that one big file can be shuffled and partly held out. An empty file
    is no document. Of one with a byte that is not UTF-8 all are skipped: as many as there are once
    each such byte is a character.
    """
    sizes, start, errors = array("q"), 0, "strict"
    while start < file.size:
        # A character takes 1 to 4 bytes, so this holds 64 Ki of them or reaches the file's end.
        data = file.read(start, min(start + 4 * MAX_CHARACTERS, file.size))
        at_end = start + len(data) == file.size
        try:
            # Leaves out the character that the end of the data cuts in two, if it does.
            text = codecs.getincrementaldecoder("utf-8")(errors).decode(data, final=at_end)
        except UnicodeDecodeError as e:
            bad.add(f"{file.shown}:{file.line_number(start + e.start)}", not_utf8(e))
            errors = "surrogateescape"
            continue
        if len(text) > MAX_CHARACTERS or not at_end:
            text = text[:MAX_CHARACTERS]
            text = text[: text.rfind("\n") + 1] or text
        sizes.append(len(text.encode("utf-8", errors)))
        start += sizes[-1]
    starts = array("q", itertools.accumulate(sizes, initial=0))
    if errors != "strict":
        sizes = array("q", [SKIPPED]) * len(sizes)
    return Spans(file, lambda data: Document(data.decode("utf-8")), starts, sizes)
