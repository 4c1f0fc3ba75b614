"""What a source is: documents in a fixed order."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

SKIPPED = -1  # the size of a record that is no document, but has a number among them


class Document(NamedTuple):
    """One record of a corpus.

    Attributes:
        text: trained on.
        prompt: comes before `text` in the same document and is read but never a target.
    """

    text: str
    prompt: str = ""


def document_of(record: Any, text_field: str) -> Document | None:
    """The document of a record {text_field: TEXT} or {"prompt": TEXT, "completion": TEXT}; None if
    it is neither."""
    if not isinstance(record, dict):
        return None
    plain = text_field in record
    text = record[text_field] if plain else record.get("completion")
    prompt = "" if plain else record.get("prompt")
    if not isinstance(text, str) or not isinstance(prompt, str):
        return None
    # JSON can spell half a surrogate pair, which no encoding can write: "?" instead.
    return Document(*(x.encode("utf-8", errors="replace").decode() for x in (text, prompt)))


class Source(Protocol):
    """Documents that can be read in any order, the same at every run.

    Attributes:
        name: for messages.
        fingerprint: equal for two sources with the same documents in the same order.
    """

    name: str
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...

    def sizes(self) -> np.ndarray:
        """UTF-8 bytes of each document's text and prompt together, or SKIPPED, int64
        [len(source)]."""
        ...

    def where(self, index: int) -> str:
        """The place of a document, for messages: its file and line, or row."""
        ...


@runtime_checkable
class StreamSource(Protocol):
    """Documents that can only be read one after another.

    Attributes:
        name: for messages.
        fingerprint: equal for two sources with the same documents in the same order.
        num_shards: parts that can be read independently of one another.
    """

    name: str
    fingerprint: str
    num_shards: int

    def open_lane(self, lane: int, num_lanes: int, state: Any = None) -> "DocumentStream":
        """One lane's share of the documents, from its start or from where `state` was taken. The
        shares of all lanes are disjoint and together all documents."""
        ...


class DocumentStream(Protocol):
    """Documents in order, once."""

    def __iter__(self) -> "DocumentStream": ...

    def __next__(self) -> Document: ...

    def state(self) -> Any:
        """Plain data that names the place before the next document."""
        ...

    def where(self) -> str:
        """The place of the document last read, for messages."""
        ...
