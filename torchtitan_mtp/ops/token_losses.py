"""Losses of a chunk of tokens from its logits, and the logits' gradient in their place."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LossOptions(NamedTuple):
    """What a token's loss is; the same for every head."""

    ignore_index: int = -100
    z_loss: float = 0.0
    softcap: float | None = None
    label_smoothing: float = 0.0
    chunk_rows: int | None = None


class TokenLosses(NamedTuple):
    """Sums over the valid rows of a chunk."""

    loss_sum: Tensor
    valid: Tensor
    correct: Tensor


def token_losses(
    logits: Tensor,
    labels: Tensor,
    options: LossOptions,
    need_grad: bool,
    weights: Tensor | None = None,
) -> tuple[TokenLosses, Tensor, Tensor]:
    """Losses of a chunk, and its logits' gradient as ``factor * G``, factor [C, 1], G [C, V].

    ``logits`` [C, V] is overwritten; G lives in it. ``weights`` [C] multiply the rows' losses. For
    the loss of a row with label y,

        (1 - a) (lse - x_y) + a (lse - mean(x)) + z lse^2,    lse = logsumexp(x), a = smoothing

    the gradient in x_j is  f p_j - (1 - a) [j = y] - a / V  with  f = 1 + 2 z lse  and
    p_j = e_j / s, which is (f / s) * (e_j - (s / f) ((1 - a) [j = y] + a / V)). A soft cap
    x = c tanh(u / c) adds the factor 1 - (x / c)^2.
    """
    vocab, smoothing = logits.shape[1], options.label_smoothing
    is_valid = labels != options.ignore_index  # [C]
    y = labels.masked_fill(~is_valid, 0).unsqueeze(1)  # [C, 1]
    slope = None
    if options.softcap is not None:
        logits.div_(options.softcap).tanh_()
        if need_grad:
            slope = logits.square().neg_().add_(1)  # [C, V]
        logits.mul_(options.softcap)
    target = logits.gather(1, y)  # [C, 1]
    mean = logits.mean(1, keepdim=True) if smoothing else None
    # The label's logit is put aside while the maximum is taken: so `correct` needs no argmax.
    others = logits.scatter_(1, y, -torch.inf).amax(1, keepdim=True)  # [C, 1]
    logits.scatter_(1, y, target)
    correct = (target > others).squeeze(1)
    maximum = torch.maximum(others, target)
    exps = logits.sub_(maximum).exp_()  # [C, V]
    sums = exps.sum(1, keepdim=True)  # [C, 1]
    lse = maximum + sums.log()
    losses = lse - target
    if mean is not None:
        losses = losses + smoothing * (target - mean)
    if options.z_loss:
        losses = losses + options.z_loss * lse.square()
    losses = losses.squeeze(1).masked_fill(~is_valid, 0)  # [C]
    if weights is not None:
        losses = losses * weights
    part = TokenLosses(losses.sum(), is_valid.sum(), (correct & is_valid).sum())
    if not need_grad:
        return part, logits, sums
    factor = 1 + 2 * options.z_loss * lse  # [C, 1]
    per_row = sums / factor
    if smoothing:
        exps.sub_(per_row * (smoothing / vocab))
    grad = exps.scatter_add_(1, y, per_row * (smoothing - 1))
    if slope is not None:
        grad.mul_(slope)
    factor = (factor / sums).masked_fill_(~is_valid.unsqueeze(1), 0)
    return part, grad, factor if weights is None else factor * weights.unsqueeze(1)
