"""The passes over a chunk's logits as one Triton kernel: a program a row, in the row's own place.

A row of 128k logits is 501 KiB in float32 and 251 KiB in bfloat16, more than a multiprocessor's
registers and shared memory hold, so its gradient, which needs the sum over the whole row, takes two
readings of it:

    read   maximum and sum of exponentials at once, the label's logit and how many others reach it,
           with label smoothing the sum; from these the loss, z-loss included, and `correct`
    read   and write the gradient, times everything that is a factor of the row, in the dtype of the
           products, where the row's logits were

That is 10 bytes a logit from float32 to bfloat16, and 6 from bfloat16; without a gradient one
reading. Rows whose label is ignored are not read, and their gradient is written as zeros.

An element of the gradient is at most as large as a logit and both start where the row does, so what
is written of some columns lies on logits of these columns and of earlier ones, which all threads of
the program have read before the barrier.

Only this file imports Triton. In Triton's interpreter (TRITON_INTERPRET=1, set before Triton is
imported) the kernel runs on CPU tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchtitan_mtp.errors import UserError
from torchtitan_mtp.ops.token_losses import LossOptions, LossSums

_BLOCK = 8192  # columns at a time, 8 of them a thread
_COLUMNS_OF_A_WARP = 256


def triton_token_losses(
    logits: Tensor,
    labels: Tensor,
    options: LossOptions,
    scale: Tensor | None,
    weights: Tensor | None,
    dtype: torch.dtype,
    need_grad: bool = True,
) -> tuple[LossSums, Tensor]:
    """The sums of `token_losses` over a chunk, and ``scale`` times the whole gradient [C, V] in
    ``dtype``.

    ``logits`` [C, V], contiguous, is overwritten; the gradient is a view of it where an element of
    ``dtype`` is not larger than one of it. A label out of range makes the loss NaN.

    Error: a CPU tensor outside of Triton's interpreter.
    """
    if not (logits.is_cuda or triton.knobs.runtime.interpret):
        raise UserError(
            f'loss.passes is "triton" and the logits are on {logits.device}; expected a CUDA '
            'device, or "compiled" or "eager"'
        )
    rows, vocab = logits.shape
    sums_dtype = torch.promote_types(logits.dtype, torch.float32)
    losses = torch.empty(rows, dtype=sums_dtype, device=logits.device)
    correct = torch.empty(rows, dtype=torch.int32, device=logits.device)
    if dtype.itemsize <= logits.dtype.itemsize:
        grad = logits.view(dtype)[:, :vocab]
    else:
        grad = torch.empty_like(logits, dtype=dtype)
    of_rows = (labels.contiguous(), scale, None if weights is None else weights.contiguous())
    block = min(_BLOCK, triton.next_power_of_2(vocab))
    with torch.cuda.device_of(logits):
        _row_kernel[(rows,)](
            *(logits, grad, *of_rows, losses, correct),
            *(logits.stride(0), grad.stride(0), vocab),
            IGNORE=options.ignore_index,
            Z_LOSS=options.z_loss,
            SOFTCAP=options.softcap,
            SMOOTHING=options.label_smoothing,
            NEED_GRAD=need_grad,
            BLOCK=block,
            num_warps=max(1, block // _COLUMNS_OF_A_WARP),
        )
    valid = (labels != options.ignore_index).sum()
    return LossSums(losses.sum(), valid, correct.sum()), grad


@triton.jit
def _row_kernel(  # type: ignore[no-untyped-def]
    logits,  # [C, V]
    grad,  # [C, V], over the logits or elsewhere
    labels,  # [C]
    scale,  # [], or None for 1
    weights,  # [C], or None for 1
    losses,  # [C]
    correct,  # [C]
    logits_stride,
    grad_stride,
    vocab,
    IGNORE: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row; the math is that of `token_losses`."""
    row = tl.program_id(0).to(tl.int64)
    x_row, g_row = logits + row * logits_stride, grad + row * grad_stride
    y = tl.load(labels + row)
    if y == IGNORE:
        tl.store(losses + row, 0.0)
        tl.store(correct + row, 0)
        if NEED_GRAD:
            for start in range(0, vocab, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                tl.store(g_row + cols, tl.zeros([BLOCK], g_row.dtype.element_ty), cols < vocab)
    else:
        dtype: tl.constexpr = losses.dtype.element_ty
        exists = (y >= 0) & (y < vocab)
        target = _capped(tl.load(x_row + y, exists, float("nan")).to(dtype), SOFTCAP)
        top, sums, mean, rivals = _read(x_row, y, target, vocab, dtype, SOFTCAP, SMOOTHING, BLOCK)
        lse = top + tl.log(sums)
        loss = lse - target + Z_LOSS * lse * lse
        if SMOOTHING > 0:
            loss += SMOOTHING * (target - mean)
        factor = tl.full([], 1.0, dtype)
        if weights is not None:
            factor *= tl.load(weights + row)
        tl.store(losses + row, loss * factor)
        tl.store(correct + row, (rivals == 0).to(tl.int32))
        if NEED_GRAD:
            if scale is not None:
                factor *= tl.load(scale)
            of_exp = (1 + 2 * Z_LOSS * lse) / sums
            _write(x_row, g_row, y, top, of_exp, factor, vocab, dtype, SOFTCAP, SMOOTHING, BLOCK)


@triton.jit
def _read(  # type: ignore[no-untyped-def]
    x_row,
    y,
    target,
    vocab,
    dtype: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """First reading: maximum, sum of exp(x - maximum), mean, and how many logits of other columns
    are not below the label's. Every lane keeps its own of each, so that the lanes meet once a row.
    """
    top = tl.full([BLOCK], float("-inf"), dtype)
    sums, total, rivals = (
        tl.zeros([BLOCK], dtype),
        tl.zeros([BLOCK], dtype),
        tl.zeros([BLOCK], tl.int32),
    )
    for start in range(0, vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = _load(x_row, cols, vocab, dtype, SOFTCAP)
        # One exponential: of the larger of x and the maximum so far it is exp(0). Where both are
        # -inf (beyond the last column) it would be NaN.
        e = tl.where(x == float("-inf"), 0.0, tl.exp(-tl.abs(x - top)))
        sums = tl.where(x > top, sums * e + 1, sums + e)
        top = tl.maximum(top, x)
        rivals += ((cols != y) & (cols < vocab) & ~(x < target)).to(tl.int32)  # NaN is a rival
        if SMOOTHING > 0:
            total += tl.where(cols < vocab, x, 0.0)
    highest = tl.max(top, 0)
    return (
        highest,
        tl.sum(sums * tl.exp(top - highest), 0),
        tl.sum(total, 0) / vocab,
        tl.sum(rivals, 0),
    )


@triton.jit
def _write(  # type: ignore[no-untyped-def]
    x_row,
    g_row,
    y,
    top,
    of_exp,
    factor,
    vocab,
    dtype: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Second reading: the gradient, `of_exp * exp(x - top)` less the target, times `factor`."""
    even = tl.full([], SMOOTHING, dtype) / vocab
    for start in range(0, vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = _load(x_row, cols, vocab, dtype, SOFTCAP)
        tl.debug_barrier()  # (a barrier of the block's threads, not for debugging alone)
        g = tl.exp(x - top) * of_exp
        if SMOOTHING > 0:
            g -= even
        g = tl.where(cols == y, g - (1 - SMOOTHING), g)
        if SOFTCAP is not None:
            g *= 1 - (x / SOFTCAP) * (x / SOFTCAP)
        tl.store(g_row + cols, (g * factor).to(g_row.dtype.element_ty), cols < vocab)


@triton.jit
def _load(x_row, cols, vocab, dtype: tl.constexpr, SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logits of some columns after the soft cap; -inf beyond the last one."""
    x = tl.load(x_row + cols, cols < vocab, float("-inf")).to(dtype)
    if SOFTCAP is not None:
        x = tl.where(cols < vocab, _capped(x, SOFTCAP), float("-inf"))
    return x


@triton.jit
def _capped(x, SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """SOFTCAP * tanh(x / SOFTCAP)."""
    if SOFTCAP is not None:
        x = SOFTCAP * (1 - 2 / (1 + tl.exp(x * (2 / SOFTCAP))))
    return x
