"""Files with one JSON record a line."""

import codecs
import functools
import json

from torchtitan_mtp.data.document import Document, document_of, num_bytes
from torchtitan_mtp.data.files import BadRecords, DataFile, Spans


def find_records(file: DataFile, text_field: str, bad: BadRecords) -> Spans:
    """A document a line that is not blank; all lines are parsed once, to know that they can be."""
    spans, offset = Spans(file, functools.partial(_parse, text_field=text_field)), 0
    with open(file.path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.isspace():
                try:
                    size = num_bytes(spans.parse(line))
                    spans.add(offset, offset + len(line), size)
                except ValueError as e:
                    bad.add(f"{file.shown}:{number}", str(e))
            offset += len(line)
    return spans


def _parse(line: bytes, text_field: str) -> Document:
    """Raises ValueError, saying what was found, unless the line is a record."""
    try:
        record = json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except UnicodeDecodeError as e:
        byte = e.object[e.start]
        raise ValueError(f"byte {byte:#04x} is not UTF-8 (iconv -t utf-8 converts it)") from e
    except (ValueError, RecursionError) as e:
        raise ValueError(f"not JSON: {e}; every line must be one record") from e
    document = document_of(record, text_field)
    if document is None:
        is_object = isinstance(record, dict)
        found = (
            {x: type(record[x]).__name__ for x in record} if is_object else type(record).__name__
        )
        raise ValueError(
            f"expected an object with a string {text_field!r}, or strings 'prompt' and"
            f" 'completion'; found {str(found)[:200]}"
        )
    return document
