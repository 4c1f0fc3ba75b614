"""Plain text files as documents."""

from pathlib import Path

from torchtitan_mtp.data.document import Document
from torchtitan_mtp.data.files import decode_span, file_size, read_span

MAX_CHARACTERS = 64 << 10


class TextFile:
    """One UTF-8 text file: one document, or, beyond 64 Ki characters, several.

    A long file is cut after the last line end within each 64 Ki characters (in the middle of a
    line longer than that), so that one big file can be shuffled and partly held out. An empty file
    is no document.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = file_size(path)
        # Document d is bytes cuts[d]..cuts[d+1]-1. Few bytes hold no more characters.
        self.cuts = [0, self.size] if self.size <= MAX_CHARACTERS else _cut(path, self.size)

    def __len__(self) -> int:
        return len(self.cuts) - 1 if self.size else 0

    def __getitem__(self, index: int) -> Document:
        start, stop = self.cuts[index], self.cuts[index + 1]
        return Document(decode_span(self.path, start, read_span(self.path, start, stop, self.size)))


def _cut(path: Path, size: int) -> list[int]:
    cuts = [0]
    while cuts[-1] < size:
        start = cuts[-1]
        # A character takes 1 to 4 bytes.
        data = read_span(path, start, min(start + 4 * MAX_CHARACTERS, size), size)
        if start + len(data) < size:
            data = data[: _whole_characters(data)]
        text = decode_span(path, start, data)
        if len(text) > MAX_CHARACTERS or start + len(data) < size:
            text = text[:MAX_CHARACTERS]
            line_end = text.rfind("\n") + 1
            text = text[: line_end or MAX_CHARACTERS]
        cuts.append(start + len(text.encode("utf-8")))
    return cuts


def _whole_characters(data: bytes) -> int:
    """Length of `data` without a character cut in two at its end."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:  # the character's first byte
            length = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if length > back else len(data)
    return len(data)
