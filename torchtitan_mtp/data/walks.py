"""The pieces of documents that a lane reads, in reading order."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from torchtitan_mtp.data.corpus import Corpus, Encoded, Epoch, encode_document
from torchtitan_mtp.data.document import DocumentStream, StreamSource
from torchtitan_mtp.data.order import shuffled
from torchtitan_mtp.data.tokenizer import Tokenizer
from torchtitan_mtp.errors import UserError

Position = dict[str, Any]


class Piece(NamedTuple):
    """Tokens start..stop-1 of a document.

    position: plain data that names the place before the piece; has "epoch".
    """

    document: Encoded
    start: int
    stop: int
    position: Position


class Walk:
    """A lane's pieces in reading order."""

    def __next__(self) -> Piece:
        raise NotImplementedError

    def position(self) -> Position:
        """The place that the next piece is found from."""
        raise NotImplementedError

    def seek(self, position: Position) -> None:
        """Go on from a piece's position, or the walk's."""
        raise NotImplementedError


class StretchWalk(Walk):
    """A lane's stretch of every epoch of a corpus, one epoch after another.

    Lane l of V reads stretch (l + e) mod V of epoch e. A stretch that ends inside a document takes
    the next token along, as a target that the stretch which begins with it does not have: in an
    epoch every token that has one before it is a target of head 1 once.
    """

    def __init__(self, corpus: Corpus, lane: int, num_lanes: int) -> None:
        self._corpus = corpus
        self._lane = lane
        self._num_lanes = num_lanes
        self._begin(0)

    def position(self) -> Position:
        return {"epoch": self._number, "index": self._index}

    def seek(self, position: Position) -> None:
        self._begin(int(position["epoch"]))
        self._index = int(position["index"])

    def __next__(self) -> Piece:
        while True:
            position, index, ends = self.position(), self._index, self._epoch.ends
            begin, end = int(ends[index - 1]) if index else 0, int(ends[index])
            document = self._corpus.encode(int(self._epoch.order[index]))
            tokens, size = len(document.tokens), end - begin
            start, stop = (
                (2 * (point - begin) * tokens + size) // (2 * size)  # rounds
                for point in (max(self._start, begin), min(self._stop, end))
            )
            self._index += 1
            if end >= self._stop:
                self._begin(self._number + 1)
            if start < stop:
                return Piece(document, start, min(stop + 1, tokens), position)

    def _begin(self, number: int) -> None:
        self._number, self._epoch = number, self._corpus.epoch(number)
        stretch, total = (self._lane + number) % self._num_lanes, int(self._epoch.ends[-1])
        self._start, self._stop = (total * i // self._num_lanes for i in (stretch, stretch + 1))
        self._index = int(np.searchsorted(self._epoch.ends, self._start, side="right"))


class DealtWalk(StretchWalk):
    """Document i of the corpus to lane i mod V, whole: how runs read, and go on reading, that began
    before there were stretches."""

    def _begin(self, number: int) -> None:
        documents = self._corpus.documents[self._lane :: self._num_lanes]
        order = shuffled(documents, self._corpus.seed, self._lane, number)
        self._number, self._epoch = number, Epoch(order, np.arange(1, len(order) + 1))
        self._start, self._stop, self._index = 0, len(order), 0


class StreamWalk(Walk):
    """A lane's share of a sequential source, again and again, in its own order."""

    def __init__(
        self, source: StreamSource, tokenizer: Tokenizer, lane: int, num_lanes: int
    ) -> None:
        self._source = source
        self._tokenizer = tokenizer
        self._lane = lane
        self._num_lanes = num_lanes
        self._epoch = 0
        # Opened when first read: opening may ask the network.
        self._stream: DocumentStream | None = None
        self._resume_at: Any = None

    def position(self) -> Position:
        place = self._resume_at if self._stream is None else self._stream.state()
        return {"epoch": self._epoch, "stream": place}

    def seek(self, position: Position) -> None:
        self._epoch = int(position["epoch"])
        self._stream = None
        self._resume_at = position["stream"]

    def __next__(self) -> Piece:
        for _ in range(2):  # at the end, once more from the start
            if self._stream is None:
                open_lane = self._source.open_lane
                self._stream = open_lane(self._lane, self._num_lanes, self._resume_at)
            try:
                position, document = self.position(), next(self._stream)
                encoded = encode_document(self._tokenizer, document, self._stream.where)
                return Piece(encoded, 0, len(encoded.tokens), position)
            except StopIteration:
                self.seek({"epoch": self._epoch + 1, "stream": None})
        raise UserError(
            f"dataset {self._source.name}: lane {self._lane} of {self._num_lanes} has no documents;"
            " use fewer data ranks, or a dataset with more documents"
        )


class OncePass(Walk):
    """All documents of the parts, once; it is not resumed. As long as several parts have some left,
    the next is of the one that has given the least tokens for its share."""

    def __init__(
        self, parts: Sequence[Corpus | StreamSource], shares: Sequence[float], tokenizer: Tokenizer
    ) -> None:
        self._unread = {i: _once(part, tokenizer) for i, part in enumerate(parts)}
        self._given = [0.0] * len(parts)
        self._shares = shares

    def __next__(self) -> Piece:
        while self._unread:
            i = min(self._unread, key=self._given.__getitem__)
            if (document := next(self._unread[i], None)) is not None:
                self._given[i] += len(document.tokens) / self._shares[i]
                return Piece(document, 0, len(document.tokens), {})
            del self._unread[i]
        raise StopIteration


def _once(part: Corpus | StreamSource, tokenizer: Tokenizer) -> Iterator[Encoded]:
    if isinstance(part, Corpus):
        return map(part.encode, map(int, part.documents))
    stream = part.open_lane(0, 1)
    return (encode_document(tokenizer, x, stream.where) for x in stream)
