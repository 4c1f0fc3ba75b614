"""What a source is: documents in a fixed order."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol


class Document(NamedTuple):
    """One record of a corpus.

    Attributes:
        text: trained on.
        prompt: comes before `text` in the same document and is read but never a target.
    """

    text: str
    prompt: str = ""


class Source(Protocol):
    """Documents that can be read in any order, the same at every run.

    Attributes:
        fingerprint: equal for two sources with the same documents in the same order.
        name: for messages.
    """

    fingerprint: str
    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...


class StreamSource(Protocol):
    """Documents that can only be read in sequence, dealt to lanes."""

    fingerprint: str
    name: str

    def open_lane(self, lane: int, num_lanes: int, state: Any = None) -> "DocumentStream":
        """This lane's share of the documents from its start, or from where `state` was taken."""
        ...


class DocumentStream(Protocol):
    """A lane's documents in order, once. `state()` is JSON-like and names the place before the
    next document."""

    def __iter__(self) -> Iterator[Document]: ...

    def __next__(self) -> Document: ...

    def state(self) -> Any: ...
