"""One continuation as it comes, step by step, and its text as far as it is certain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from torchtitan_mtp.data.tokenizer import Tokenizer
from torchtitan_mtp.inference.decoding import Decoder, check, decode
from torchtitan_mtp.inference.draft_length import DraftLength
from torchtitan_mtp.inference.rows import EndIds, Rows
from torchtitan_mtp.inference.sampling import Sampler
from torchtitan_mtp.models.transformer import Transformer

UNREADABLE = "\N{REPLACEMENT CHARACTER}"  # what bytes that are no character are decoded to


@torch.inference_mode()
def stream(
    model: Transformer,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampler: Sampler,
    *,
    num_draft: int = 0,
    eos_id: EndIds = None,
) -> Iterator[list[int]]:
    """The tokens that `generate` would give, each step's as soon as they are known.

    num_draft: drafts a step, up to n - 1; 0 decodes plainly.
    """
    check(model, [prompt], max_new_tokens)
    decoder = Decoder(model, [prompt], max_new_tokens, num_draft, sampler)
    rows, told = Rows(1, max_new_tokens, eos_id, num_draft), 0
    for _ in decode(decoder, rows, DraftLength(num_draft, len(model.layers), adapt=False)):
        yield rows.tokens[0][told:]
        told = len(rows.tokens[0])


class TextStream:
    """Text of tokens that arrive bit by bit: a character whose bytes are not all there waits."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.told = 0  # characters

    def add(self, tokens: Sequence[int]) -> str:
        """What the text is certain to have gained."""
        self.tokens += tokens
        return self._new(self.tokenizer.decode(self.tokens).rstrip(UNREADABLE))

    def finish(self) -> str:
        """What was still waiting."""
        return self._new(self.tokenizer.decode(self.tokens))

    def _new(self, text: str) -> str:
        new, self.told = text[self.told :], max(self.told, len(text))
        return new
