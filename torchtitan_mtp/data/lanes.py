"""A lane: a sequence of documents as one stream of tokens, cut into windows."""

from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np

from torchtitan_mtp.data.document import Document, DocumentStream, Source, StreamSource
from torchtitan_mtp.data.order import shuffled
from torchtitan_mtp.data.targets import PADDING
from torchtitan_mtp.data.tokenizer import Tokenizer
from torchtitan_mtp.errors import UserError

Position = dict[str, Any]


class Walk(Protocol):
    """A lane's documents in reading order."""

    def __next__(self) -> Document: ...

    def position(self) -> Position:
        """Plain data that names the place before the next document; has "epoch"."""
        ...

    def where(self) -> str:
        """The place of the document last read, for messages."""
        ...

    def seek(self, position: Position) -> None: ...


class ShuffledWalk:
    """Documents of a random-access source, again and again, in a new order each epoch."""

    def __init__(self, source: Source, documents: np.ndarray, seed: int, lane: int) -> None:
        self._source = source
        self._documents = documents
        self._seed = seed
        self._lane = lane
        self._epoch = -1
        self.seek({"epoch": 0, "index": 0})

    def position(self) -> Position:
        return {"epoch": self._epoch, "index": self._index}

    def where(self) -> str:
        return self._source.where(self._last)

    def seek(self, position: Position) -> None:
        if self._epoch != position["epoch"]:
            self._epoch = int(position["epoch"])
            self._order = shuffled(self._documents, self._seed, self._lane, self._epoch)
        self._index = int(position["index"])

    def __next__(self) -> Document:
        self._last = int(self._order[self._index])
        document = self._source[self._last]
        self._index += 1
        if self._index == len(self._order):
            self.seek({"epoch": self._epoch + 1, "index": 0})
        return document


class StreamWalk:
    """A lane's share of a sequential source, again and again, in its own order."""

    def __init__(self, source: StreamSource, lane: int, num_lanes: int) -> None:
        self._source = source
        self._lane = lane
        self._num_lanes = num_lanes
        self._epoch = 0
        # Opened when first read: opening may ask the network.
        self._stream: DocumentStream | None = None
        self._resume_at: Any = None

    def position(self) -> Position:
        place = self._resume_at if self._stream is None else self._stream.state()
        return {"epoch": self._epoch, "stream": place}

    def where(self) -> str:
        return self._source.name if self._stream is None else self._stream.where()

    def seek(self, position: Position) -> None:
        self._epoch = int(position["epoch"])
        self._stream = None
        self._resume_at = position["stream"]

    def __next__(self) -> Document:
        for _ in range(2):  # at the end, once more from the start
            if self._stream is None:
                open_lane = self._source.open_lane
                self._stream = open_lane(self._lane, self._num_lanes, self._resume_at)
            try:
                return next(self._stream)
            except StopIteration:
                self.seek({"epoch": self._epoch + 1, "stream": None})
        raise UserError(
            f"dataset {self._source.name}: lane {self._lane} of {self._num_lanes} has no documents;"
            " use fewer data ranks, or a dataset with more documents"
        )


class OncePass:
    """The documents of those numbers, or all of a stream, once."""

    def __init__(self, source: Source | StreamSource, numbers: Iterable[int]) -> None:
        self._stream: DocumentStream | None = None
        if isinstance(source, StreamSource):
            self._stream = source.open_lane(0, 1)
        else:
            self._source, self._numbers = source, iter(numbers)

    def position(self) -> Position:
        return {}  # a pass is not resumed

    def where(self) -> str:
        return self._source.where(self._last) if self._stream is None else self._stream.where()

    def seek(self, position: Position) -> None:
        raise NotImplementedError

    def __next__(self) -> Document:
        if self._stream is not None:
            return next(self._stream)
        self._last = int(next(self._numbers))
        return self._source[self._last]


class LaneWindow(NamedTuple):
    """One row of a `Window`: tokens, doc_ids int64 and may_be_target bool, each [S+n]."""

    tokens: np.ndarray
    doc_ids: np.ndarray
    may_be_target: np.ndarray


class _Open(NamedTuple):
    """A document that the next window begins in, or that it looked ahead into."""

    tokens: np.ndarray  # bos, prompt, text, eos
    first_target: int  # tokens before it are bos and prompt
    position: Position


class Lane:
    """Windows of S+n tokens, a new one every S tokens of the stream.

    Each document is bos + tokens + eos. The n tokens of lookahead are read again by the next
    window, so every token after the stream's first is the target of head 1 exactly once.
    """

    def __init__(self, walk: Walk, tokenizer: Tokenizer) -> None:
        self._walk = walk
        self._tokenizer = tokenizer
        self._open: deque[_Open] = deque()
        self._offset = 0  # of the next window, in the first open document
        self._held = 0  # open tokens from there on

    def position(self) -> Position:
        """Where the next window begins, as plain data: the document and the token in it."""
        document = self._open[0].position if self._open else self._walk.position()
        return {**document, "offset": self._offset}

    def seek(self, position: Position) -> None:
        self._walk.seek(position)
        self._open.clear()
        self._offset = int(position["offset"])
        self._held = -self._offset

    def next_window(self, seq_len: int, lookahead: int) -> LaneWindow | None:
        """The next window; at the end of a finite walk padded, then None."""
        width = seq_len + lookahead
        while self._held < width and self._open_next():
            pass
        if self._held < 2:  # a token without a next one: nothing to predict
            return None
        window = self._cut(width)
        self._advance(seq_len)
        return window

    def _open_next(self) -> bool:
        position = self._walk.position()
        try:
            document = self._walk.__next__()
        except StopIteration:
            return False
        prompt = self._encode(document.prompt) if document.prompt else np.empty(0, np.int32)
        bos, eos = [self._tokenizer.bos_id], [self._tokenizer.eos_id]
        tokens = np.concatenate([bos, prompt, self._encode(document.text), eos], dtype=np.int32)
        self._open.append(_Open(tokens, 1 + len(prompt) if document.prompt else 0, position))
        self._held += len(tokens)
        return True

    def _encode(self, text: str) -> np.ndarray:
        try:
            return self._tokenizer.encode(text)
        except (UserError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:  # those written in Rust panic with BaseExceptions
            raise UserError(
                f"data {self._walk.where()}: the tokenizer fails on this document"
                f" ({type(e).__name__}: {str(e)[:200]}); mend it or leave it out"
            ) from e

    def _cut(self, width: int) -> LaneWindow:
        tokens = np.zeros(width, np.int64)
        doc_ids = np.full(width, PADDING, np.int64)
        may_be_target = np.zeros(width, np.bool_)
        filled, start = 0, self._offset
        for doc_id, document in enumerate(self._open):
            if filled == width:
                break
            piece = document.tokens[start : start + width - filled]
            end = filled + len(piece)
            tokens[filled:end] = piece
            doc_ids[filled:end] = doc_id
            may_be_target[filled + max(0, document.first_target - start) : end] = True
            filled, start = end, 0
        return LaneWindow(tokens, doc_ids, may_be_target)

    def _advance(self, count: int) -> None:
        self._offset += count
        self._held -= count
        while self._open and self._offset >= len(self._open[0].tokens):
            self._offset -= len(self._open.popleft().tokens)
