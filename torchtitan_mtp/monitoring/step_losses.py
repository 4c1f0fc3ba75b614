"""The losses of one step over micro-batches and ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan_mtp.distributed.mesh import all_reduce


class StepLosses:
    """Sums over the micro-batches of a step on this rank, kept on the device."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.sums = torch.zeros(3, n, dtype=torch.float64, device=device)  # loss, correct, valid
        self.total = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, loss: Tensor, loss_sum: Tensor, valid: Tensor, correct: Tensor) -> None:
        """Add one micro-batch's `LossOutput`."""
        self.total += loss.detach()
        self.sums += torch.stack((loss_sum.double(), correct.double(), valid.double()))

    def reduce(self) -> dict[str, Any]:
        """Over all ranks: `losses`, `accuracies`, `targets` (n each), `total`, `max_loss` of head
        1. Means are nan without a target."""
        own = self.sums[0, 0] / self.sums[2, 0]
        max_loss = all_reduce(own.where(self.sums[2, 0] > 0, -torch.inf), dist.ReduceOp.MAX)
        loss_sum, correct, valid = sums = all_reduce(self.sums.clone())
        nothing = sums.new_tensor(torch.nan)
        return {
            "losses": (loss_sum / valid).tolist(),
            "accuracies": (correct / valid).tolist(),
            "targets": valid.tolist(),
            "total": all_reduce(self.total).where(valid.any(), nothing).item(),
            "max_loss": max_loss.where(valid[0] > 0, nothing).item(),
        }
