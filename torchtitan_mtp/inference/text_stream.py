"""The text of tokens that come one by one, as far as it is certain, up to a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torchtitan_mtp.data.tokenizer import Tokenizer

UNREADABLE = "\N{REPLACEMENT CHARACTER}"  # what bytes that are no character are decoded to


class TextStream:
    """What a row's new tokens add to the text of its prompt.

    text: what is certain of it, which `show` is given piece by piece. A character whose bytes are
    not all there waits, and so does what a stop string may begin with. stopped: a stop string was
    completed, and the text ends before it; of several, the one that was complete first, as if the
    text came character by character.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        prompt: Sequence[int] = (),
        show: Callable[[str], object] = str,
    ) -> None:
        self.tokenizer, self.show = tokenizer, show
        self.stop = [string for string in stop if string]
        self.text, self.stopped = "", False
        self._held = ""  # the end of the text that a stop string may begin with
        # Tokens are decoded after some that came before, for the space in front of a word is lost
        # at the beginning of a text (SentencePiece).
        self._before, self._new = list(prompt), list[int]()
        text = tokenizer.decode(self._before)
        self._told = len(text.rstrip(UNREADABLE))  # characters of both
        # New tokens may complete the prompt's last character; what stays unreadable is its own.
        self._unsure = len(text) - self._told

    def add(self, token: int) -> bool:
        """Take the next token; whether that completed a stop string."""
        self._new.append(token)
        text = self.tokenizer.decode(self._before + self._new)
        certain = text.rstrip(UNREADABLE)
        self._gain(certain[self._told :])
        self._told = max(self._told, len(certain))
        alone = self.tokenizer.decode(self._new)
        if alone and text == certain and text.endswith(alone):  # they begin with a whole character
            self._before, self._new, self._told = self._new, [], len(alone)
        return self.stopped

    def finish(self) -> str:
        """The whole text, with what was still waiting."""
        if not self.stopped:
            text = self.tokenizer.decode(self._before + self._new)
            self._gain(text[self._told :])
            self._tell(self._held)
            self._told, self._held = len(text), ""
        return self.text

    def _gain(self, new: str) -> None:
        if new:
            own = len(new) - len(new.lstrip(UNREADABLE))
            new, self._unsure = new[min(own, self._unsure) :], 0
        text = self._held + new
        ends = [(at + len(s), at) for s in self.stop if (at := text.find(s)) >= 0]
        if ends:
            self.stopped, size = True, min(ends)[1]
        else:  # all but the longest end of it that a stop string begins with
            starts = (s[:k] for s in self.stop for k in range(1, len(s)))
            size = len(text) - max((len(s) for s in starts if text.endswith(s)), default=0)
        self._held = "" if self.stopped else text[size:]
        self._tell(text[:size])

    def _tell(self, text: str) -> None:
        self.text += text
        self.show(text)
