"""The loss of n heads one at a time, with one gradient buffer for the weight they share."""

from __future__ import annotations

import torch
from torch import Tensor

from torchtitan_mtp.ops.chunked import (
    accumulation_dtype,
    gradient_unit,
    head_loss_and_grad,
)
from torchtitan_mtp.ops.linear_cross_entropy import LossOutput
from torchtitan_mtp.ops.token_losses import LossOptions


class HeadByHeadLoss:
    """`linear_cross_entropy` of one head a call, for an engine that runs heads one by one.

    Every call adds to one [V, D] buffer; the call with `last = True` hands the buffer to autograd
    as the weight's gradient, so the n heads cost one such gradient and one reduction of it.

    head_scales: [n], as in `linear_cross_entropy`.
    """

    def __init__(self, head_scales: Tensor, options: LossOptions) -> None:
        self.head_scales, self.options = head_scales, options
        self.unit = gradient_unit(head_scales)
        self.d_weight: Tensor | None = None

    def __call__(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, head: int, last: bool
    ) -> LossOutput:
        """Head number `head` (from 0): hidden [N, D], weight [V, D], labels [N] -> sums []."""
        d_weight = None
        if weight.requires_grad:
            if self.d_weight is None:
                self.d_weight = torch.zeros_like(weight, dtype=accumulation_dtype(weight.dtype))
            d_weight = self.d_weight
        if last:
            self.d_weight = None
        scale = self.head_scales[head]
        return LossOutput(
            *_OneHead.apply(hidden, weight, labels, scale, self.unit, self.options, d_weight, last)
        )


class _OneHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, scale, unit, options, d_weight, last):  # type: ignore[no-untyped-def]
        head = head_loss_and_grad(
            hidden,
            weight,
            labels,
            scale / unit,
            options,
            need_d_hidden=ctx.needs_input_grad[0],
            d_weight=d_weight,
        )
        ctx.d_hidden, ctx.d_weight = head.d_hidden, d_weight if last else None
        ctx.unit, ctx.weight_dtype = unit, weight.dtype
        ctx.mark_non_differentiable(head.loss_sum, head.valid, head.correct)
        return head.loss_sum * scale, head.loss_sum, head.valid, head.correct

    @staticmethod
    def backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
        d_hidden, d_weight, factor = ctx.d_hidden, ctx.d_weight, grad_loss * ctx.unit
        ctx.d_hidden = ctx.d_weight = None
        if d_hidden is not None:
            d_hidden = d_hidden.mul_(factor)
        if d_weight is not None:
            d_weight = d_weight.mul_(factor).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None, None, None, None
