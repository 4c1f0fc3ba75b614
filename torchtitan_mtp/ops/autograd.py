"""The loss of n heads in one autograd function, whose gradients are made in the forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchtitan_mtp.ops.chunked import (
    LossOutput,
    accumulation_dtype,
    fp16_gradient_scale,
    head_loss_and_grad,
    matmul_dtype,
)
from torchtitan_mtp.ops.token_losses import LossOptions
from torchtitan_mtp.ops.vocabulary import VocabularyShard


class HeadByHeadLoss:
    """`linear_cross_entropy` of n heads in any number of calls, whose only memory is one chunk's
    logits: each call's ``loss.backward()`` runs once, without a factor, and nothing else needs the
    hidden states. So a head's gradient overwrites its state, and the weight's is added to
    ``weight.grad`` where that exists in the accumulation dtype. Else all calls add to one
    [V, D] buffer, which the call with `last` hands to autograd, to be reduced once.

    Args:
        head_scales: [n], as in `linear_cross_entropy`.
    """

    def __init__(self, head_scales: Tensor, options: LossOptions) -> None:
        self.head_scales, self.options = head_scales, options
        self.d_weight: Tensor | None = None
        self.teacher: Tensor | None = None  # [N, D]
        self.teacher_rows: Tensor | None = None  # [N]

    def teach(self, state: Tensor, lookahead: int = 0) -> None:
        """Head 1's state [B, S, D], for the heads after it: a copy, as its gradient takes its
        place. Or, with `lookahead`, pieces of the sequences [B, W, S/W + lookahead, D], each with
        the states after its own."""
        self.teacher = state.detach().flatten(0, -2)
        if lookahead:
            rows = torch.arange(len(self.teacher), device=state.device).unflatten(
                0, state.shape[:3]
            )
            self.teacher_rows = rows[..., :-lookahead].flatten()
        else:
            self.teacher = self.teacher.clone()

    def __call__(
        self,
        hiddens: Sequence[Tensor],
        weight: Tensor,
        labels: Tensor,
        first: int = 0,
        last: bool = True,
        vocabulary: VocabularyShard | None = None,
    ) -> LossOutput:
        """m heads from number `first` (from 0) on.

        hiddens: m tensors [N, D]; weight [V, D], or this rank's rows of a `vocabulary`, and then
        the hiddens' gradients are to be summed over its ranks; labels [N, m].
        """
        grad_scale = fp16_gradient_scale(self.head_scales, hiddens[0])
        d_weight = self._weight_gradient(weight, grad_scale is None)
        needs_grad = [last and self.d_weight is not None, *map(needs_gradient, hiddens)]
        if last:
            self.d_weight = None
        scales = self.head_scales[first : first + len(hiddens)]
        how = (self.options, grad_scale, needs_grad, d_weight, True)
        tensors = (weight, labels, scales, None, self.teacher, self.teacher_rows, first, vocabulary)
        return LossOutput(*HeadsLoss.apply(*tensors, *how, *hiddens))

    def _weight_gradient(self, weight: Tensor, add_to_grad: bool) -> Tensor | None:
        """What the weight's gradient is added to: `.grad` where possible, else the buffer."""
        if not needs_gradient(weight):
            return None
        if self.d_weight is None:
            grad = weight.grad if weight.is_leaf else None
            dtype = accumulation_dtype(weight.dtype)
            if add_to_grad and grad is not None and grad.dtype == dtype and grad.is_contiguous():
                return grad
            self.d_weight = _zero_gradient(weight)
        return self.d_weight


class HeadsLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        weight,
        labels,
        head_scales,
        row_weights,
        teacher,
        teacher_rows,
        first,
        vocabulary,
        options,
        scale,
        needs_grad,
        dw,
        once,
        *heads,
    ):
        """weight to options as in `linear_cross_entropy`, row_weights [N, n], heads n of [N, D] ->
        loss [], and loss sums, valid and correct targets [n]; the gradients are made here.

        needs_grad: whether autograd gets a gradient from here, for each of (weight, *heads).
        dw: the buffer that the weight's gradient is added to; None: a new one. once: the backward
        runs once and without a factor, and gradients overwrite the heads' states.
        """
        mm = matmul_dtype(heads[0])
        scales = head_scales if scale is None else head_scales / scale
        tensors = (list(heads), weight, labels, scales, row_weights, teacher, teacher_rows)
        spread = vocabulary or (None, 0, 0)
        arguments = (*tensors, first, mm, needs_grad, *spread, *options)
        if torch.compiler.is_compiling():
            results = _heads_op(*arguments)
        else:
            results = _heads(*arguments, d_weight=dw, in_place=once)
        loss_sum, valid, correct, *gradients = results
        ctx.mark_non_differentiable(loss_sum, valid, correct)
        # Plain attributes: saved tensors would stay referenced and force a copy into `.grad`.
        ctx.gradients, ctx.scale, ctx.once = gradients, scale, once
        ctx.needs_grad, ctx.weight_dtype = needs_grad, weight.dtype
        return (loss_sum * head_scales).sum(), loss_sum, valid, correct

    @staticmethod
    def backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
        """grad_loss [] times the gradients of the forward. Error: they were used up before."""
        gradients, factor = ctx.gradients, ctx.scale
        # Whether the graph must stay usable: retain_graph, or a compiled graph.
        keep = torch.compiler.is_compiling()
        keep = keep or torch._C._autograd._get_current_graph_task_keep_graph()
        if gradients is None:
            raise RuntimeError(
                "linear_cross_entropy: a second backward over one forward, whose gradients the "
                "first has used up; pass retain_graph=True to the first, or run the op again"
            )
        if not keep:
            ctx.gradients = None
        if not ctx.once:
            factor = grad_loss if factor is None else grad_loss * factor
        if factor is not None:
            gradients = [g * factor if keep else g.mul_(factor) for g in gradients]
        rest = iter(gradients)
        d_weight, *d_hiddens = (next(rest) if need else None for need in ctx.needs_grad)
        if d_weight is not None:
            d_weight = d_weight.to(ctx.weight_dtype)
        return d_weight, *(None,) * 12, *d_hiddens


def needs_gradient(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def _zero_gradient(weight: Tensor) -> Tensor:
    dtype = accumulation_dtype(weight.dtype)
    return torch.zeros_like(weight, dtype=dtype, memory_format=torch.contiguous_format)


def _heads(
    hiddens: list[Tensor],
    weight: Tensor,
    labels: Tensor,
    head_scales: Tensor,
    row_weights: Tensor | None,
    teacher: Tensor | None,
    teacher_rows: Tensor | None,
    first: int,
    mm: torch.dtype,
    needs_grad: list[bool],
    group: str | None,
    first_token: int,
    vocabulary_size: int,
    *options: Any,
    d_weight: Tensor | None = None,
    in_place: bool = False,
) -> list[Tensor]:
    """[loss_sum [n], valid [n], correct [n]] and the gradients that `needs_grad` asks for."""
    if d_weight is None and needs_grad[0]:
        d_weight = _zero_gradient(weight)
    vocabulary = VocabularyShard(group, first_token, vocabulary_size) if group else None
    heads = [
        head_loss_and_grad(
            hidden,
            weight,
            labels[:, k],
            head_scales[k],
            LossOptions(*options),
            row_weights=None if row_weights is None else row_weights[:, k],
            teacher=teacher if first + k else None,
            teacher_rows=teacher_rows,
            ahead=first + k,
            need_d_hidden=needs_grad[1 + k],
            in_place=in_place,
            d_weight=d_weight,
            mm=mm,
            vocabulary=vocabulary,
        )
        for k, hidden in enumerate(hiddens)
    ]
    sums, d_hiddens = zip(*heads, strict=True)
    gradients = (d_weight if needs_grad[0] else None, *d_hiddens)
    totals = (torch.stack(parts) for parts in zip(*sums, strict=True))  # [n] each
    return [*totals, *(gradient for gradient in gradients if gradient is not None)]


# torch.compile takes this op whole: no graph break, and no trace of its loops.
_heads_op = torch.library.custom_op(
    "torchtitan_mtp::linear_cross_entropy_heads",
    _heads,
    mutates_args=(),
    schema="(Tensor[] hiddens, Tensor weight, Tensor labels, Tensor head_scales, "
    "Tensor? row_weights, Tensor? teacher, Tensor? teacher_rows, int first, ScalarType mm, "
    "bool[] needs_grad, str? group, int first_token, int vocabulary_size, "
    "int ignore_index, float z_loss, float? softcap, float label_smoothing, "
    "SymInt? chunk_rows, str passes, bool bf16_logits, str? target_loss, float target_weight, "
    "str compile_backend) -> Tensor[]",
)


@_heads_op.register_fake
def _(hiddens, weight, labels, scales, weights, teacher, rows, first, mm, needs_grad, *_):  # type: ignore[no-untyped-def]
    acc, n = accumulation_dtype(weight.dtype), len(hiddens)
    like = [torch.empty_like(weight, dtype=acc, memory_format=torch.contiguous_format)]
    like += [torch.empty_like(h, memory_format=torch.contiguous_format) for h in hiddens]
    return [
        weight.new_empty(n, dtype=acc),
        labels.new_empty(n),
        labels.new_empty(n),
        *(t for t, need in zip(like, needs_grad, strict=True) if need),
    ]
