"""Models of a few thousand parameters, random or with a known text, and naive decoding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchtitan_mtp.config import MTP
from torchtitan_mtp.data.targets import Batch
from torchtitan_mtp.models.args import ModelArgs
from torchtitan_mtp.models.transformer import Transformer, build_model
from torchtitan_mtp.mtp import add_heads

FAMILIES = [("parallel", False), ("sequential", False), ("sequential", True)]  # share_weights
FAMILIES += [("medusa", False)]
RAW = ("raw", False)  # a chain on the state before the final norm


def random_model(
    heads: str = "parallel",
    n: int = 4,
    share_weights: bool = False,
    seed: int = 0,
    vocab: int = 11,
    dtype: torch.dtype = torch.float64,
    **args: Any,
) -> Transformer:
    """Weights large enough that every earlier token matters; two query heads a key head."""
    shape = ModelArgs(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, multiple_of=16)
    model = build_model(replace(shape, vocab_size=vocab, **args), dtype)
    mtp = MTP(num_future_tokens=n, share_weights=share_weights)
    mtp.heads = heads if heads in ("parallel", "medusa") else "sequential"
    mtp.trunk_state = "raw" if heads == "raw" else "normalized"
    add_heads(model, mtp)
    model.to_empty(device="cpu")
    model.init_buffers()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator, dtype=dtype)
            if name.endswith(".bias"):
                param.copy_(0.5 * noise)
            else:
                param.copy_(1 + 0.1 * noise if param.ndim == 1 else noise / param.shape[1] ** 0.5)
        model.tok_embeddings.weight.mul_(model.args.dim**0.5)
    return model.requires_grad_(False)


def batch_of(text: list[int], n: int) -> Batch:
    """The positions of `text` that have all n - 1 future tokens, as one row."""
    size = len(text) - (n - 1)
    row = torch.tensor([text])
    future = torch.stack([row[:, k : k + size] for k in range(1, n)] or [row[:, :0]], dim=-1)
    at = torch.arange(size).unsqueeze(0)
    return Batch(row[:, :size], future, torch.empty(0), at, torch.zeros_like(at))


def head_logits(model: Transformer, text: list[int], n: int) -> Tensor:
    """Teacher-forced logits [n, S, V] of every head by a full forward, without any cache."""
    return model.output(torch.cat(model(batch_of(text, n))))


def naive_greedy(model: Transformer, prompt: list[int], count: int, n: int) -> list[int]:
    """A full forward for every token."""
    text = list(prompt)
    for _ in range(count):
        logits = head_logits(model, text + [0] * (n - 1), n)  # the future feeds heads 2..n alone
        text.append(int(logits[0, -1].argmax()))
    return text[len(prompt) :]


def scripted_model(heads: str, following: list[int], drafts: list[list[int]]) -> Transformer:
    """A model whose text is known: token t is followed by following[t].

    drafts[k-2][t]: what head k drafts after token t, which is the last known token for parallel
    heads, and the token before the drafted one for sequential heads.

    Token t is the unit vector e_t; attention adds nothing, and each head moves e_t into a slot of
    the width that is its own, where `output` reads its map.
    """
    vocab, n = len(following), len(drafts) + 1
    model = random_model(
        heads, n, vocab=vocab, dim=n * vocab, n_heads=1, n_kv_heads=1, multiple_of=n * vocab
    )
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(1.0 if param.ndim == 1 else 0.0)
        eye = torch.eye(vocab, dtype=torch.float64)
        model.tok_embeddings.weight[:, :vocab] = eye
        for slot, followers in enumerate([following, *drafts]):
            columns = slice(slot * vocab, (slot + 1) * vocab)
            model.output.weight[:, columns] = eye[followers].T
        for slot, head in enumerate(model.mtp.heads, start=1):
            columns = slice(slot * vocab, (slot + 1) * vocab)
            if heads == "parallel":  # silu(w1 x) * w3 x is positive where x is
                head.feed_forward.w1.weight[:vocab, :vocab] = eye
                head.feed_forward.w3.weight[:vocab, :vocab] = eye
                head.feed_forward.w2.weight[columns, :vocab] = 100 * eye
            else:
                head.eh_proj.weight[columns, :vocab] = eye  # from the embedding's half
    return model
