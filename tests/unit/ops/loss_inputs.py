"""Random inputs of the loss, its gradients, and every combination of its options."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from torchtitan_mtp.ops import linear_cross_entropy

IGNORE = -100


def make_inputs(n=3, n_rows=37, dim=16, vocab=101, dtype=torch.float64, ignored=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hiddens = [
        torch.randn(n_rows, dim, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(n)
    ]
    weight = torch.randn(vocab, dim, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(vocab, (n_rows, n), generator=generator)
    labels[torch.rand(n_rows, n, generator=generator) < ignored] = IGNORE
    return [h.requires_grad_() for h in hiddens], weight.requires_grad_(), labels


def gradients(loss, hiddens, weight, factor=1.0):
    return torch.autograd.grad(loss * factor, [*hiddens, weight], allow_unused=True)


OPTIONS = [
    {"z_loss": z, "softcap": cap, "label_smoothing": smoothing}
    for z, cap, smoothing in itertools.product((0.0, 1e-2), (None, 5.0), (0.0, 0.1))
]


def loss_and_backward(*tensors: Any, **options: Any) -> None:
    """A step of the op: its loss, and the gradients of that."""
    linear_cross_entropy(*tensors, **options).loss.backward()
