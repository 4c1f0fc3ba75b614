"""Plain text files as documents."""

import codecs

from torchtitan_mtp.data.document import Document
from torchtitan_mtp.data.files import BadRecords, DataFile, Spans

MAX_CHARACTERS = 64 << 10


def find_texts(file: DataFile, bad: BadRecords) -> Spans:
    """One UTF-8 text file: one document, or, beyond 64 Ki characters, several.

    A long file is cut after the last line end within each 64 Ki characters (in the middle of a
    line longer than that), so that one big file can be shuffled and partly held out. An empty file
    is no document, nor is one with a byte that is not UTF-8.
    """
    spans, start = Spans(file, lambda data: Document(data.decode("utf-8"))), 0
    try:
        while start < file.size:
            # A character takes 1 to 4 bytes, so this holds 64 Ki of them or reaches the file's end.
            data = file.read(start, min(start + 4 * MAX_CHARACTERS, file.size))
            at_end = start + len(data) == file.size
            # Leaves out the character that the end of the data cuts in two, if it does.
            text = codecs.getincrementaldecoder("utf-8")().decode(data, final=at_end)
            if len(text) > MAX_CHARACTERS or not at_end:
                text = text[:MAX_CHARACTERS]
                text = text[: text.rfind("\n") + 1] or text
            size = len(text.encode("utf-8"))
            spans.add(start, start + size, size)
            start += size
    except UnicodeDecodeError as e:
        where = f"{file.shown}:{file.line_number(start + e.start)}"
        bad.add(where, f"byte {e.object[e.start]:#04x} is not UTF-8 (iconv -t utf-8 converts it)")
        return Spans(file, spans.parse)
    return spans
