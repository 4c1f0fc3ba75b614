"""Light heads (Medusa; Cai et al. 2024, arXiv 2401.10774, section 2.1.1): head 1 is the ordinary
model, and each further head one residual block on its state, under the shared `output`:

    h_1 = norm(x);      h_k = h_1 + silu(W_k h_1),  k = 2..n

W_k starts as zeros, so that every head starts as head 1. (The paper gives each head an `output` of
its own, a copy of the model's to begin with.)
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan_mtp.config import MTP
from torchtitan_mtp.models.heads import BlockContext, TrunkParts
from torchtitan_mtp.models.layers import NormParams, normalize
from torchtitan_mtp.mtp.parallel import IndependentHeads


class MedusaHead(nn.Module):
    """A residual block of one linear layer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim, bias=False)

    def forward(self, h: Tensor, trunk_norm: NormParams | None = None) -> Tensor:
        """h_k [B, S, D] from h_1; with the trunk's final norm, from the state before it."""
        if trunk_norm is not None:
            h = normalize(h, trunk_norm)
        return h + F.silu(self.linear(h))

    def init_std(self, name: str) -> float:
        """Standard deviation of the weight at initialisation."""
        return 0.0


class MedusaHeads(IndependentHeads):
    """Heads 2..n on the state of the whole model."""

    def __init__(self, trunk: TrunkParts, mtp: MTP) -> None:
        super().__init__(trunk, mtp.num_future_tokens, mtp.detach_trunk)
        heads = (MedusaHead(trunk.args.dim) for _ in range(mtp.num_future_tokens - 1))
        self.heads = nn.ModuleList(heads)

    def hidden(self, k: int, state: Tensor, context: BlockContext) -> Tensor:
        """As `IndependentHeads.hidden`. The final norm is applied inside the head's call, so that
        checkpointing keeps the trunk's state alone for the backward."""
        if k == 1:
            return self.trunk_parts.norm(state)
        return self.heads[k - 2](*self.trunk_input(state))
