"""`linear_cross_entropy` written a second time: whole logits in plain torch, by autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.naive import distance
from torchtitan_mtp.ops import LossOptions, LossOutput


def naive_loss(
    hiddens: Sequence[Tensor],
    weight: Tensor,
    labels: Tensor,
    head_scales: Tensor | None = None,
    options: LossOptions | None = None,
    *,
    row_weights: Tensor | None = None,
    teacher: Tensor | None = None,
    first: int = 0,
    **fields,
) -> LossOutput:
    """As `linear_cross_entropy`, in the dtype of the inputs."""
    options = options or LossOptions(**fields)
    sums, corrects, valid = [], [], labels != options.ignore_index
    for k, hidden in enumerate(hiddens):
        x, y = cap(F.linear(hidden, weight), options), labels[:, k]  # [N, V], [N]
        losses = F.cross_entropy(
            x,
            y,
            ignore_index=options.ignore_index,
            label_smoothing=options.label_smoothing,
            reduction="none",
        )
        if teacher is not None and first + k:
            # (What comes around the end has no label.)
            taught = cap(F.linear(teacher, weight).detach().roll(-first - k, 0), options)
            soft = distance(taught, x, options.target_loss)
            losses = options.target_weight * soft + (1 - options.target_weight) * losses
        losses = losses + options.z_loss * torch.logsumexp(x, -1).square()
        if row_weights is not None:
            losses = losses * (row_weights if row_weights.dim() == 1 else row_weights[:, k])
        sums.append(losses[valid[:, k]].sum())
        of_label = x.gather(1, y.clamp(min=0, max=len(weight) - 1).unsqueeze(1))
        corrects.append(((x >= of_label).sum(1) == 1) & valid[:, k])  # above every other
    loss_sum = torch.stack(sums)
    scales = 1 if head_scales is None else head_scales
    correct = torch.stack(corrects).sum(1)
    return LossOutput((loss_sum * scales).sum(), loss_sum.detach(), valid.sum(0), correct)


def cap(logits: Tensor, options: LossOptions) -> Tensor:
    if options.softcap is None:
        return logits
    return options.softcap * torch.tanh(logits / options.softcap)
