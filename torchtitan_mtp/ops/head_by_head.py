"""The loss for an engine that runs the backward itself: n heads in any number of calls, with no
memory but one chunk's logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchtitan_mtp.ops.chunked import (
    accumulation_dtype,
    gradient_unit,
    head_loss_and_grad,
    matmul_dtype,
)
from torchtitan_mtp.ops.linear_cross_entropy import LossOutput
from torchtitan_mtp.ops.token_losses import LossOptions


class HeadByHeadLoss:
    """`linear_cross_entropy` for a caller that takes the heads in turn and runs each call's
    ``loss.backward()`` once, without a factor. Knowing this, it can do without memory of its own:

    - The weight's gradient is added to ``weight.grad`` where that is there in the precision of
      accumulation. Else all calls add to one [V, D] buffer, which the call with `last` hands to
      autograd: n heads cost one such gradient and one reduction of it.
    - With `in_place` a head's gradient takes the storage of its hidden state.

    head_scales: [n], as in `linear_cross_entropy`.
    """

    def __init__(self, head_scales: Tensor, options: LossOptions) -> None:
        self.head_scales, self.options = head_scales, options
        self.d_weight: Tensor | None = None

    def __call__(
        self,
        hiddens: Sequence[Tensor],
        weight: Tensor,
        labels: Tensor,
        first: int = 0,
        last: bool = True,
        in_place: bool = False,
    ) -> LossOutput:
        """m heads from number `first` (from 0) on: m tensors [N, D], weight [V, D], labels [N, m].

        in_place: whether nothing else needs the hidden states, whose values are lost.
        """
        mm = matmul_dtype(hiddens[0])
        unit = gradient_unit(self.head_scales, hiddens[0].dtype, mm)
        d_weight, hand_over = self._weight_gradient(weight, unit is None)
        if last:
            self.d_weight = None
        outputs = []
        for k, hidden in enumerate(hiddens):
            final = hand_over and last and k == len(hiddens) - 1
            outputs.append(
                _OneHead.apply(
                    hidden,
                    weight,
                    labels[:, k],
                    self.head_scales[first + k],
                    unit,
                    self.options,
                    mm,
                    d_weight,
                    final,
                    in_place,
                )
            )
        losses, *statistics = (torch.stack(parts) for parts in zip(*outputs, strict=True))
        return LossOutput(losses.sum(), *statistics)

    def _weight_gradient(self, weight: Tensor, add_to_grad: bool) -> tuple[Tensor | None, bool]:
        """Where the weight's gradient is added, and whether autograd is to get it from there."""
        if not (weight.requires_grad and torch.is_grad_enabled()):
            return None, False
        dtype, grad = accumulation_dtype(weight.dtype), weight.grad
        if self.d_weight is None:
            if add_to_grad and grad is not None and grad.dtype == dtype and grad.is_contiguous():
                return grad, False
            self.d_weight = torch.zeros_like(
                weight, dtype=dtype, memory_format=torch.contiguous_format
            )
        return self.d_weight, True


class _OneHead(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, hidden, weight, labels, scale, unit, options, mm, d_weight, hand_over, in_place
    ):
        """hidden [N, D], weight [V, D], labels [N], scale and unit [] -> scale * loss sum, loss
        sum, valid and correct targets, [] each; the gradients are made here."""
        head = head_loss_and_grad(
            hidden,
            weight,
            labels,
            scale if unit is None else scale / unit,
            options,
            need_d_hidden=ctx.needs_input_grad[0],
            in_place=in_place,
            d_weight=d_weight,
            mm=mm,
        )
        ctx.d_hidden, ctx.d_weight = head.d_hidden, d_weight if hand_over else None
        ctx.unit, ctx.weight_dtype = unit, weight.dtype
        ctx.mark_non_differentiable(head.loss_sum, head.valid, head.correct)
        return head.loss_sum * scale, head.loss_sum, head.valid, head.correct

    @staticmethod
    def backward(ctx, *_):  # type: ignore[no-untyped-def]
        d_hidden, d_weight = ctx.d_hidden, ctx.d_weight
        ctx.d_hidden = ctx.d_weight = None
        if ctx.unit is not None:
            for gradient in (d_hidden, d_weight):
                if gradient is not None:
                    gradient.mul_(ctx.unit)
        if d_weight is not None:
            d_weight = d_weight.to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None, None, None, None, None, None
