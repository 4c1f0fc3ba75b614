"""What all blocks are made of."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class NormParams(NamedTuple):
    """A norm of another module, to be applied inside a block's call, so that checkpointing the
    block covers it. weights: its parameters by name, detached or not."""

    module: nn.Module
    weights: dict[str, Tensor]


def normalize(x: Tensor, norm: NormParams) -> Tensor:
    """x [..., D] -> [..., D]."""
    return functional_call(norm.module, norm.weights, (x,))
