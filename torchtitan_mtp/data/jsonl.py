"""Files with one JSON record a line."""

import json
from array import array

import numpy as np

from torchtitan_mtp.data.document import Document, document_of
from torchtitan_mtp.data.files import DataFile
from torchtitan_mtp.errors import UserError


class JsonlFile:
    """A document a line that is not blank; lines are found once, and parsed when asked for."""

    def __init__(self, file: DataFile, text_field: str) -> None:
        self._file = file
        self._text_field = text_field
        self._starts, self._stops = array("q"), array("q")
        offset = 0
        with open(file.path, "rb") as lines:
            for line in lines:
                if not line.isspace():
                    self._starts.append(offset)
                    self._stops.append(offset + len(line))
                offset += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def sizes(self) -> np.ndarray:
        return np.array(self._stops, np.int64) - np.array(self._starts, np.int64)

    def __getitem__(self, index: int) -> Document:
        start, stop = self._starts[index], self._stops[index]
        text = self._file.decode(self._file.read(start, stop), start)
        try:
            record = json.loads(text)
        except ValueError as e:
            raise UserError(
                f"data {self.where(index)}: not JSON: {e}; every line must be one record"
            ) from e
        document = document_of(record, self._text_field)
        if document is None:
            found = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise UserError(
                f"data {self.where(index)}: expected an object with a string"
                f" {self._text_field!r}, or strings 'prompt' and 'completion'; found {found}"
            )
        return document

    def where(self, index: int) -> str:
        return f"{self._file.shown}:{self._file.line_number(self._starts[index])}"
