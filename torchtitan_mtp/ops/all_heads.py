"""The loss of n heads in one autograd function, which torch.compile takes whole."""

from __future__ import annotations

import torch
from torch import Tensor

from torchtitan_mtp.ops.chunked import (
    accumulation_dtype,
    gradient_unit,
    head_loss_and_grad,
    matmul_dtype,
)
from torchtitan_mtp.ops.token_losses import LossOptions


def chunked_linear_cross_entropy(
    hiddens: tuple[Tensor, ...],
    weight: Tensor,
    labels: Tensor,
    head_scales: Tensor,
    row_weights: Tensor | None,
    options: LossOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All heads in one pass, with one buffer for the weight's gradient.

    Arguments and results are those of `linear_cross_entropy`.
    """
    needs_grad = [t.requires_grad and torch.is_grad_enabled() for t in (weight, *hiddens)]
    mm = matmul_dtype(hiddens[0])
    return _AllHeads.apply(
        weight, labels, head_scales, row_weights, options, mm, needs_grad, *hiddens
    )


class _AllHeads(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, weight, labels, head_scales, row_weights, options, mm, needs_grad, *hiddens
    ):
        """weight [V, D], labels [N, n], head_scales [n], row_weights [N, n], hiddens n of [N, D] ->
        loss [], and loss sums, valid and correct targets [n]; the gradients are made here."""
        run = _all_heads_op if torch.compiler.is_compiling() else _all_heads
        unit = gradient_unit(head_scales, hiddens[0].dtype, mm)
        scales = head_scales if unit is None else head_scales / unit
        loss_sum, valid, correct, *gradients = run(
            list(hiddens), weight, labels, scales, row_weights, mm, needs_grad, *options
        )
        loss = (loss_sum * head_scales).sum()
        ctx.mark_non_differentiable(loss_sum, valid, correct)
        # Plain attributes: saved tensors would stay referenced and force a copy into `.grad`.
        ctx.gradients, ctx.unit = gradients, unit
        ctx.needs_grad, ctx.weight_dtype = needs_grad, weight.dtype
        return loss, loss_sum, valid, correct

    @staticmethod
    def backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
        """grad_loss [] times the gradients of the forward. Error: they were used up before."""
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy: a second backward over one forward, whose gradients the "
                "first has used up; pass retain_graph=True to the first, or run the op again"
            )
        gradients = ctx.gradients
        factor = grad_loss if ctx.unit is None else grad_loss * ctx.unit
        if _keeps_graph():
            gradients = [gradient * factor for gradient in gradients]
        else:
            ctx.gradients = None
            for gradient in gradients:
                gradient.mul_(factor)
        if ctx.needs_grad[0]:
            gradients[0] = gradients[0].to(ctx.weight_dtype)
        rest = iter(gradients)
        d_weight, *d_hiddens = (next(rest) if need else None for need in ctx.needs_grad)
        return d_weight, None, None, None, None, None, None, *d_hiddens


def _keeps_graph() -> bool:
    """Whether this backward must leave its graph usable (retain_graph, or a compiled graph)."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._autograd._get_current_graph_task_keep_graph()


def _all_heads(
    hiddens: list[Tensor],
    weight: Tensor,
    labels: Tensor,
    head_scales: Tensor,
    row_weights: Tensor | None,
    mm: torch.dtype,
    needs_grad: list[bool],
    ignore_index: int,
    z_loss: float,
    softcap: float | None,
    label_smoothing: float,
    chunk_rows: int | None,
    compile: bool,
) -> list[Tensor]:
    """[loss_sum [n], valid [n], correct [n]] and the gradients of those that need one.

    `needs_grad` and the gradients are in the order (weight, *hiddens).
    """
    options = LossOptions(ignore_index, z_loss, softcap, label_smoothing, chunk_rows, compile)
    d_weight = None
    if needs_grad[0]:
        d_weight = torch.zeros_like(
            weight,
            dtype=accumulation_dtype(weight.dtype),
            memory_format=torch.contiguous_format,
        )
    heads = [
        head_loss_and_grad(
            hidden,
            weight,
            labels[:, k],
            head_scales[k],
            options,
            row_weights=None if row_weights is None else row_weights[:, k],
            need_d_hidden=needs_grad[1 + k],
            d_weight=d_weight,
            mm=mm,
        )
        for k, hidden in enumerate(hiddens)
    ]
    gradients: list[Tensor | None] = [d_weight, *(head.d_hidden for head in heads)]
    return [
        torch.stack([head.loss_sum for head in heads]),
        torch.stack([head.valid for head in heads]),
        torch.stack([head.correct for head in heads]),
        *(gradient for gradient in gradients if gradient is not None),
    ]


# torch.compile takes this op whole: no graph break, and no trace of its loops.
_all_heads_op = torch.library.custom_op(
    "torchtitan_mtp::linear_cross_entropy_heads",
    _all_heads,
    mutates_args=(),
    schema="(Tensor[] hiddens, Tensor weight, Tensor labels, Tensor head_scales, "
    "Tensor? row_weights, ScalarType mm, bool[] needs_grad, int ignore_index, float z_loss, "
    "float? softcap, float label_smoothing, SymInt? chunk_rows, bool compile) -> Tensor[]",
)


@_all_heads_op.register_fake
def _(hiddens, weight, labels, head_scales, row_weights, mm, needs_grad, *_):  # type: ignore[no-untyped-def]
    acc, n = accumulation_dtype(weight.dtype), len(hiddens)
    like = [torch.empty_like(weight, dtype=acc, memory_format=torch.contiguous_format)]
    like += [torch.empty_like(h, memory_format=torch.contiguous_format) for h in hiddens]
    return [
        weight.new_empty(n, dtype=acc),
        labels.new_empty(n),
        labels.new_empty(n),
        *(t for t, need in zip(like, needs_grad, strict=True) if need),
    ]
