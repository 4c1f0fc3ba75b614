"""How others run n heads through the loss, rewritten as engines to stand beside ours.

Each takes what `torchtitan_mtp.mtp.ENGINES` take and leaves the same gradients in `.grad`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torchtitan_mtp.data.targets import Batch
from torchtitan_mtp.models.trunk import Trunk
from torchtitan_mtp.ops import LossOptions


def _cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


def held_logits(
    model: Trunk, batch: Batch, head_scales: Tensor, options: LossOptions, last: bool
) -> None:
    """Every depth's logits, then the losses: Megatron-Core, MaxText and TorchTitan 0.3.0."""
    logits = [F.linear(h, model.output.weight) for h in model(batch)]  # n of [B, S, V]
    losses = [
        F.cross_entropy(x.flatten(0, 1).float(), batch.labels[..., k].flatten(), reduction="sum")
        for k, x in enumerate(logits)
    ]
    (torch.stack(losses) * head_scales).sum().backward()


def checkpointed_logits(
    model: Trunk, batch: Batch, head_scales: Tensor, options: LossOptions, last: bool
) -> None:
    """Meta lingua's way: activation checkpointing around each head's projection and loss."""
    losses = [
        checkpoint(
            _cross_entropy,
            h.flatten(0, 1),
            model.output.weight,
            batch.labels[..., k].flatten(),
            use_reentrant=False,
        )
        for k, h in enumerate(model(batch))
    ]
    (torch.stack(losses) * head_scales).sum().backward()


PEERS: dict[str, Callable[..., None]] = {
    "logits held": held_logits,
    "logits checkpointed": checkpointed_logits,
}
