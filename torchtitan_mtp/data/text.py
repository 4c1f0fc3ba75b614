"""Plain text files as documents."""

import numpy as np

from torchtitan_mtp.data.document import Document
from torchtitan_mtp.data.files import DataFile

MAX_CHARACTERS = 64 << 10


class TextFile:
    """One UTF-8 text file: one document, or, beyond 64 Ki characters, several.

    A long file is cut after the last line end within each 64 Ki characters (in the middle of a
    line longer than that), so that one big file can be shuffled and partly held out. An empty file
    is no document.
    """

    def __init__(self, file: DataFile) -> None:
        self._file = file
        # Document d is bytes cuts[d]..cuts[d+1]-1. Few bytes hold no more characters.
        small = file.size <= MAX_CHARACTERS
        self._cuts = ([0, file.size] if file.size else [0]) if small else _cut(file)

    def __len__(self) -> int:
        return len(self._cuts) - 1

    def where(self, index: int) -> str:
        return f"{self._file.shown}:{self._file.line_number(self._cuts[index])}"

    def sizes(self) -> np.ndarray:
        return np.diff(np.array(self._cuts, np.int64))

    def __getitem__(self, index: int) -> Document:
        start, stop = self._cuts[index], self._cuts[index + 1]
        return Document(self._file.decode(self._file.read(start, stop), start))


def _cut(file: DataFile) -> list[int]:
    cuts = [0]
    while cuts[-1] < file.size:
        start = cuts[-1]
        # A character takes 1 to 4 bytes, so this holds 64 Ki of them or reaches the file's end.
        data = file.read(start, min(start + 4 * MAX_CHARACTERS, file.size))
        at_end = start + len(data) == file.size
        text = file.decode(data if at_end else _whole_characters(data), start)
        if len(text) > MAX_CHARACTERS or not at_end:
            text = text[:MAX_CHARACTERS]
            text = text[: text.rfind("\n") + 1] or text
        cuts.append(start + len(text.encode("utf-8")))
    return cuts


def _whole_characters(data: bytes) -> bytes:
    """`data` without the character that its end cuts in two, if it does."""
    for back in range(1, 4):
        byte = data[-back]
        if byte & 0xC0 != 0x80:  # the first byte of a character, which tells its length
            length = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return data[:-back] if length > back else data
    return data
