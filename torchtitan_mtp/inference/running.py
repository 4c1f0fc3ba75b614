"""Running the model over one span: as it is, or compiled for the few shapes that decoding has.

Prompts and catching up come in every length and run as they are. A step does not: with caches of a
fixed length, all of which is attended to under a mask, every step looks alike to a compiler, and
nothing is compiled twice (the static shapes of gpt-fast).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchtitan_mtp.inference.cache import CacheView
from torchtitan_mtp.models.attention import AttentionContext
from torchtitan_mtp.models.transformer import Transformer


def run_trunk(
    model: Transformer, tokens: Tensor, context: AttentionContext, caches: Sequence[CacheView]
) -> tuple[Tensor, Tensor]:
    """Tokens [B, size] -> z under the last layer (head 1's), and head 1's h: [B, size, D] each."""
    x = z = model.tok_embeddings(tokens)
    for block, cache in zip(model.layers.values(), caches, strict=True):
        z = x
        x = block(x, context, cache)
    return z, model.norm(x)


def run_block(block: nn.Module, *args: Any) -> Tensor:
    """A head's block or module over a span."""
    return block(*args)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


class Runner:
    """Compiles forwards over at most `compiled_sizes` positions a row; 0 compiles none."""

    def __init__(self, compiled_sizes: int) -> None:
        self.compiled_sizes = compiled_sizes

    def trunk(self, model: Transformer, tokens: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        """See `run_trunk`."""
        return self._choose(run_trunk, tokens)(model, tokens, *args)

    def block(self, block: nn.Module, x: Tensor, *args: Any) -> Tensor:
        """See `run_block`; x [B, size, D]."""
        return self._choose(run_block, x)(block, x, *args)

    def _choose(self, function: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
        return _compiled(function) if x.shape[1] <= self.compiled_sizes else function
