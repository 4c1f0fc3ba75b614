"""Speculative decoding on prompts of real text, in float32, by models that learned a little."""

from __future__ import annotations

import argparse
import inspect
import textwrap

import pytest
import torch
from tiny_models import random_model

from torchtitan_mtp.data.targets import Window, make_batch
from torchtitan_mtp.inference import generate
from torchtitan_mtp.models.transformer import Transformer
from torchtitan_mtp.mtp.engine import head_by_head
from torchtitan_mtp.ops import LossOptions

# Without indentation, of which models of this size would learn little else.
SOURCE = " ".join((inspect.getsource(argparse) + inspect.getsource(textwrap)).split())
TEXT = torch.tensor(list(SOURCE.encode())).clamp(max=127)
PROMPTS = [TEXT[at : at + 3 + at % 20].tolist() for at in range(0, 200 * 97, 97)]


def trained(heads: str, n: int) -> Transformer:
    """A model of ASCII that has seen 40 small batches of the text."""
    model = random_model(heads, n, vocab=128, dtype=torch.float32).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = TEXT[: 40 * 8 * 64].view(40, 8, 64)
    scales = torch.full((n,), 1 / (8 * (64 - n)))
    for tokens in rows:
        batch = make_batch(Window(tokens, torch.zeros_like(tokens)), n)
        head_by_head(model, batch, scales, LossOptions())
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False)


@pytest.mark.parametrize(
    ("heads", "n", "every"),
    [
        ("parallel", 4, 20),
        ("sequential", 8, 20),
        *(
            pytest.param(heads, n, 1, marks=pytest.mark.exhaustive)
            for heads in ("parallel", "sequential")
            for n in (2, 4, 8)
        ),
    ],
)
def test_200_prompts_get_the_tokens_of_plain_decoding(heads: str, n: int, every: int) -> None:
    """Eight at a time, and `every` so manyth alone."""
    model = trained(heads, n)
    plain, drafted = [], []
    for begin in range(0, 200, 8):
        rows = PROMPTS[begin : begin + 8]
        plain += generate(model, rows, 12).tokens
        batch = generate(model, rows, 12, speculative=True)
        assert batch.tokens == plain[begin:]
        drafted += [batch.stats.tokens_per_step]
    few = PROMPTS[::every]
    alone = [generate(model, [prompt], 12, speculative=True).tokens[0] for prompt in few]
    assert alone == plain[::every]
    assert max(drafted) > 1.1 and len({tuple(row) for row in plain}) > 8
