"""A lane: a sequence of documents as one stream of tokens, cut into windows."""

from collections import deque
from collections.abc import Iterator

import numpy as np
import torch

from torchtitan_mtp.data.targets import PADDING, Window
from torchtitan_mtp.data.walks import Piece, Position


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
