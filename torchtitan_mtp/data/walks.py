"""The pieces of documents that a lane reads, in reading order."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from torchtitan_mtp.data.corpus import Corpus, Encoded, Epoch, encode_document
from torchtitan_mtp.data.hub import StreamSource
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


class Stretches(Iterator[Piece]):
    """A lane's stretch of every epoch of a corpus, one epoch after another.

    Lane l of V reads stretch (l + e) mod V of epoch e. A stretch that ends inside a document takes
    the next token along, as a target that the stretch which begins with it does not have: in an
    epoch every token that has one before it is a target of head 1 once.
    """

    def __init__(
        self, corpus: Corpus, lane: int, num_lanes: int, position: Position | None = None
    ) -> None:
        self._corpus = corpus
        self._lane = lane
        self._num_lanes = num_lanes
        self._begin(int(position["epoch"]) if position else 0)
        if position:
            self._index = int(position["index"])

    def position(self) -> Position:
        return {"epoch": self._number, "index": self._index}

    def __next__(self) -> Piece:
        while True:
            position, index, ends = self.position(), self._index, self._epoch.ends
            begin, end = int(ends[index - 1]) if index else 0, int(ends[index])
            document = self._corpus.encode(int(self._epoch.order[index]))
            tokens, size = len(document.tokens), end - begin or 1
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


class DealtDocuments(Stretches):
    """Document i of the corpus to lane i mod V, whole: how runs read, and go on reading, that began
    before there were stretches."""

    def _begin(self, number: int) -> None:
        documents = self._corpus.documents[self._lane :: self._num_lanes]
        order = shuffled(documents, self._corpus.seed, self._lane, number)
        self._number, self._epoch = number, Epoch(order, np.arange(1, len(order) + 1))
        self._start, self._stop, self._index = 0, len(order), 0


def stream_share(
    source: StreamSource, tokenizer: Tokenizer, lane: int, num_lanes: int, position: Position
) -> Iterator[Piece]:
    """A lane's share of a sequential source, again and again, in its own order."""
    epoch, place = int(position["epoch"]), position["stream"]
    empty = False
    while not empty:
        empty = place is None
        for at, document, where in source.read(lane, num_lanes, place):
            empty = False
            tokens = encode_document(tokenizer, document, partial(str, where))
            yield Piece(tokens, 0, len(tokens.tokens), {"epoch": epoch, "stream": at})
        epoch, place = epoch + 1, None
    raise UserError(
        f"dataset {source.name}: lane {lane} of {num_lanes} has no documents; use fewer data ranks,"
        " or a dataset with more documents"
    )


def once(
    parts: Sequence[Corpus | StreamSource], shares: Sequence[float], tokenizer: Tokenizer
) -> Iterator[Piece]:
    """All documents of the parts, once; it is not resumed. As long as several parts have some left,
    the next is of the one that has given the least tokens for its share."""
    given = dict.fromkeys(range(len(parts)), 0.0)  # by those that have some left
    unread = [_once(part, tokenizer) for part in parts]
    while given:
        i = min(given, key=given.__getitem__)
        if (document := next(unread[i], None)) is None:
            del given[i]
        else:
            given[i] += len(document.tokens) / shares[i]
            yield Piece(document, 0, len(document.tokens), {})


def _once(part: Corpus | StreamSource, tokenizer: Tokenizer) -> Iterator[Encoded]:
    if isinstance(part, Corpus):
        return map(part.encode, map(int, part.documents[~part.skipped[part.documents]]))
    return (encode_document(tokenizer, x, partial(str, where)) for _, x, where in part.read())
