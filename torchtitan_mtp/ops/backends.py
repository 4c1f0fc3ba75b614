"""The backends of `linear_cross_entropy` by name: this project's, plain torch, and other libraries'.

Each takes (hiddens, weight [V, D], labels [N, n], head_scales [n], options) and returns
(loss, loss_sum [n], valid [n], correct [n]). Only "chunked" and "naive" have every option.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan_mtp.errors import UserError
from torchtitan_mtp.ops.chunked import ChunkedLinearCrossEntropy, LossOptions, accumulation_dtype

Heads = tuple[Tensor, ...]
Result = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.compiler.disable
def chunked(
    hiddens: Heads, weight: Tensor, labels: Tensor, head_scales: Tensor, options: LossOptions
) -> Result:
    """`ops/chunked.py`: one chunk of one head's logits at a time."""
    return ChunkedLinearCrossEntropy.apply(weight, labels, head_scales, options, *hiddens)


def naive(
    hiddens: Heads, weight: Tensor, labels: Tensor, head_scales: Tensor, options: LossOptions
) -> Result:
    """Whole logits in float32 and plain autograd: the reference."""
    sums, correct = [], []
    for k, hidden in enumerate(hiddens):
        logits = F.linear(hidden, weight)  # [N, V]
        logits = logits.to(accumulation_dtype(hidden.dtype))
        if options.softcap is not None:
            logits = options.softcap * torch.tanh(logits / options.softcap)
        y = labels[:, k]
        total = F.cross_entropy(
            logits,
            y,
            ignore_index=options.ignore_index,
            label_smoothing=options.label_smoothing,
            reduction="sum",
        )
        if options.z_loss:
            lse = torch.logsumexp(logits, -1).masked_fill(y == options.ignore_index, 0)
            total = total + options.z_loss * lse.square().sum()
        sums.append(total)
        correct.append((logits.detach().argmax(-1) == y).sum())
    return _result(sums, labels, head_scales, options, torch.stack(correct))


def _result(
    sums: list[Tensor],
    labels: Tensor,
    head_scales: Tensor,
    options: LossOptions,
    correct: Tensor,
) -> Result:
    loss_sum = torch.stack(sums)  # [n]
    loss = (loss_sum * head_scales).sum()
    return loss, loss_sum.detach(), (labels != options.ignore_index).sum(0), correct


BACKENDS: dict[str, Callable[[Heads, Tensor, Tensor, Tensor, LossOptions], Result]] = {
    "chunked": chunked,
    "naive": naive,
}
