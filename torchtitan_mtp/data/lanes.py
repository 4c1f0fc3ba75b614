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
        """position: of a lane that went as far; of the first piece, for one that begins."""
        self._pieces = pieces
        self._first = position
        # What the next window begins in, and what the last one looked ahead into.
        self._open: deque[Piece] = deque()
        self._offset = int(position.get("offset", 0))  # of the next window, in the first open piece
        self._held = -self._offset  # open tokens from there on

    def position(self) -> Position:
        """Where the next window begins, as plain data: the piece and the token in it."""
        piece = self._open[0].position if self._open else self._first
        return {**piece, "offset": self._offset}

    def next_window(self, seq_len: int, lookahead: int) -> Window | None:
        """The next window, of one row [S+n]; at the end of the pieces padded, then None."""
        width = seq_len + lookahead
        while self._held < width and (piece := next(self._pieces, None)) is not None:
            self._open.append(piece)
            self._held += piece.stop - piece.start
        if self._held < 2:  # a token without a next one: nothing to predict
            return None
        window = self.cut(width)
        self._offset += seq_len
        self._held -= seq_len
        while self._open and self._offset >= self._open[0].stop - self._open[0].start:
            piece = self._open.popleft()
            self._offset -= piece.stop - piece.start
        return window

    def cut(self, width: int) -> Window:
        """The next tokens as far as they are there, [width], padded; `loss_mask` is of all."""
        tokens = np.zeros(width, np.int64)
        doc_ids = np.full(width, PADDING, np.int64)
        loss_mask = np.zeros(width, np.bool_)
        filled, skipped = 0, self._offset
        for doc_id, (document, start, stop, _) in enumerate(self._open):
            if filled == width:
                break
            start += skipped
            part = document.tokens[start : min(stop, start + width - filled)]
            end = filled + len(part)
            tokens[filled:end] = part
            doc_ids[filled:end] = doc_id
            loss_mask[filled + max(0, document.first_target - start) : end] = True
            filled, skipped = end, 0
        return Window(*map(torch.from_numpy, (tokens, doc_ids, loss_mask)))


def stretches(
    corpus: Corpus, lane: int, num_lanes: int, position: Position, dealt: bool = False
) -> Iterator[Piece]:
    """A lane's stretch of every epoch of a corpus, one epoch after another.

    Lane l of V reads stretch (l + e) mod V of epoch e. A stretch that ends inside a document takes
    the next token along, as a target that the stretch which begins with it does not have: in an
    epoch every token that has one before it is a target of head 1 once. dealt: document i of the
    corpus to lane i mod V, whole, as runs read, and go on reading, that began before there were
    stretches.
    """
    index = position.get("index")
    for number in itertools.count(int(position["epoch"])):
        if dealt:
            order = shuffled(corpus.documents[lane::num_lanes], corpus.seed, lane, number)
            epoch, first, last = Epoch(order, np.arange(1, len(order) + 1)), 0, len(order)
        else:
            epoch, stretch = corpus.epoch(number), (lane + number) % num_lanes
            total = int(epoch.ends[-1])
            first, last = (total * i // num_lanes for i in (stretch, stretch + 1))
        if index is None:
            index = int(np.searchsorted(epoch.ends, first, side="right"))
        for i in range(index, len(epoch.order)):
            begin, end = int(epoch.ends[i - 1]) if i else 0, int(epoch.ends[i])
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


def stream_share(
    source: StreamSource, tokenizer: Tokenizer, lane: int, num_lanes: int, position: Position
) -> Iterator[Piece]:
    """A lane's share of a sequential source, again and again, in its own order."""
    epoch, place = int(position["epoch"]), position.get("stream")
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
