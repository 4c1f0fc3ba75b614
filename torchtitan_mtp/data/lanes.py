"""A lane: a sequence of pieces of documents as one stream of tokens, cut into windows."""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from torchtitan_mtp.data.corpus import Corpus, Encoded, Epoch, encode_document
from torchtitan_mtp.data.hub import StreamSource
from torchtitan_mtp.data.order import shuffled
from torchtitan_mtp.data.targets import PADDING, Window
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


class Lane:
    """Windows of S+n tokens, a new one every S tokens of the stream.

    The n tokens of lookahead are read again by the next window, so every token after the stream's
    first is the target of head 1 exactly once.
    """

    def __init__(self, pieces: Iterator[Piece], position: Position) -> None:
        """position: where the lane continues; the first piece's, for a new lane."""
        self._pieces = pieces
        self._first = position
        # The piece that the next window begins in, and those read ahead for the last window.
        self._buffer: deque[Piece] = deque()
        self._offset = int(position.get("offset", 0))  # in the first piece
        self._buffered = -self._offset  # tokens from there on

    def position(self) -> Position:
        """Where the next window begins, as plain data: the piece and the token in it."""
        piece = self._buffer[0].position if self._buffer else self._first
        return {**piece, "offset": self._offset}

    def next_window(self, seq_len: int, lookahead: int) -> Window | None:
        """The next window, of one row [S+n]; at the end of the pieces padded, then None."""
        width = seq_len + lookahead
        while self._buffered < width and (piece := next(self._pieces, None)) is not None:
            self._buffer.append(piece)
            self._buffered += piece.stop - piece.start
        if self._buffered < 2:  # a token without a next one: nothing to predict
            return None
        window = self.peek(width)
        self._offset += seq_len
        self._buffered -= seq_len
        while self._buffer and self._offset >= self._buffer[0].stop - self._buffer[0].start:
            piece = self._buffer.popleft()
            self._offset -= piece.stop - piece.start
        return window

    def peek(self, width: int) -> Window:
        """The next `width` tokens, padded where none are buffered, with a `loss_mask` always."""
        tokens = np.zeros(width, np.int64)
        doc_ids = np.full(width, PADDING, np.int64)
        loss_mask = np.zeros(width, np.bool_)
        filled, skipped = 0, self._offset
        for doc_id, (document, start, stop, _) in enumerate(self._buffer):
            if filled == width:
                break
            start += skipped
            stop = min(stop, start + width - filled)
            end = filled + max(0, stop - start)
            tokens[filled:end] = document.tokens[start:stop]
            doc_ids[filled:end] = doc_id
            loss_mask[filled:end] = document.is_target[start:stop]
            filled, skipped = end, 0
        return Window(*map(torch.from_numpy, (tokens, doc_ids, loss_mask)))


def corpus_pieces(
    corpus: Corpus, lane: int, num_lanes: int, position: Position, dealt: bool = False
) -> Iterator[Piece]:
    """A lane's segment of every epoch of a corpus, one epoch after another.

    Lane l of V reads segment (l + e) mod V of epoch e. A segment that ends inside a document also
    reads the next token, as a target only: the segment that begins with it has it as an input
    only. So in an epoch every token but a document's first is a target of head 1 once. dealt: whole
    documents, document i to lane i mod V, as in runs that began before there were segments.
    """
    index = position.get("index")
    for number in itertools.count(int(position["epoch"])):
        corpus.check_some()  # else there would be no end to epochs without a piece
        if dealt:
            order = shuffled(corpus.documents[lane::num_lanes], corpus.seed, lane, number)
            epoch, first, last = Epoch(order, np.arange(1, len(order) + 1)), 0, len(order)
        else:
            epoch, segment = corpus.epoch(number), (lane + number) % num_lanes
            total = int(epoch.cumulative_sizes[-1])
            first, last = (total * i // num_lanes for i in (segment, segment + 1))
        ends = epoch.cumulative_sizes
        if index is None:
            index = int(np.searchsorted(ends, first, side="right"))
        for i in range(index, len(epoch.order)):
            begin, end = int(ends[i - 1]) if i else 0, int(ends[i])
            document = corpus.encode(int(epoch.order[i]))
            tokens, size = len(document.tokens), end - begin or 1
            start, stop = (
                (2 * (point - begin) * tokens + size) // (2 * size)  # rounds
                for point in (max(first, begin), min(last, end))
            )
            if start < stop:
                place = {"epoch": number, "index": i}
                yield Piece(document, start, min(stop + 1, tokens), place)
            if end >= last:
                break
        index = None


def stream_pieces(
    source: StreamSource, tokenizer: Tokenizer, lane: int, num_lanes: int, position: Position
) -> Iterator[Piece]:
    """A lane's share of a sequential source, epoch after epoch, in the source's own order."""
    epoch, place = int(position["epoch"]), position.get("stream")
    empty = False
    while not empty:
        empty = place is None
        for at, document, where in source.read(lane, num_lanes, place):
            tokens = encode_document(tokenizer, document, partial(str, where), source.bad)
            if size := len(tokens.tokens):
                empty = False
                yield Piece(tokens, 0, size, {"epoch": epoch, "stream": at})
        epoch, place = epoch + 1, None
    raise UserError(
        f"dataset {source.name}: lane {lane} of {num_lanes} has no documents; use fewer data ranks,"
        " or a dataset with more documents"
    )


def one_pass_pieces(
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
        elif len(document.tokens):
            given[i] += len(document.tokens) / shares[i]
            yield Piece(document, 0, len(document.tokens), {})


def _once(part: Corpus | StreamSource, tokenizer: Tokenizer) -> Iterator[Encoded]:
    if isinstance(part, Corpus):
        return map(part.encode, map(int, part.documents[~part.skipped[part.documents]]))
    read = part.read()
    return (encode_document(tokenizer, x, partial(str, where), part.bad) for _, x, where in read)
