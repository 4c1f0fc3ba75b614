"""The passes over a chunk's logits as one Triton kernel: a program a row, in the row's own place.

A row of 128k logits is 501 KiB in float32; a multiprocessor's registers and shared memory hold 484
KiB together. So the gradient, which needs the sum over the whole row, takes two readings of it:

    read   maximum and sum of exponentials at once, the label's logit and how many others reach it,
           with label smoothing the sum; from these the loss, z-loss included, and `correct`
    read   and write the gradient, times everything that is a factor of the row, in the dtype of the
           products, where the row's logits were

That is 10 bytes a logit from float32 to bfloat16, and 6 from bfloat16; without a gradient one
reading. A teacher's row takes a reading between the two (kl with the logits, lk and tv without), lk
and tv one more of both, and the last reading is of both. Rows whose label is ignored are not read,
and their gradient is written as zeros.

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

_BLOCK = 8192  # columns at a time at most: 8 a thread
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


def triton_token_losses(
    logits: Tensor,
    labels: Tensor,
    options: LossOptions,
    scale: Tensor | None,
    weights: Tensor | None,
    dtype: torch.dtype,
    need_grad: bool = True,
    teacher: Tensor | None = None,
) -> tuple[LossSums, Tensor]:
    """The sums of `token_losses` over a chunk, and ``scale`` times the whole gradient [C, V] in
    ``dtype``.

    ``logits`` [C, V], contiguous, is overwritten; the gradient is a view of it where an element of
    ``dtype`` is not larger than one of it. The ``teacher``'s logits [C, V] are only read. A label
    out of range makes the loss NaN.

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
    factors = (scale, None if weights is None else weights.contiguous())
    block = columns_at_a_time(vocab, teacher is not None)
    with torch.cuda.device_of(logits):
        _row_kernel[(rows,)](
            *(logits, grad, teacher, labels.contiguous(), *factors, losses, correct),
            *(logits.stride(0), grad.stride(0), vocab),
            IGNORE=options.ignore_index,
            Z_LOSS=options.z_loss,
            SOFTCAP=options.softcap,
            SMOOTHING=options.label_smoothing,
            TARGET=None if teacher is None else options.target_loss,
            SHARE=0.0 if teacher is None else options.target_weight,
            NEED_GRAD=need_grad,
            BLOCK=block,
            num_warps=max(1, block // 256),
        )
    valid = (labels != options.ignore_index).sum()
    return LossSums(losses.sum(), valid, correct.sum()), grad


def columns_at_a_time(vocab: int, taught: bool) -> int:
    """Columns that a row's threads take at a time, 256 a warp. For a teacher's loss half as many
    where rows are no whole 16 elements, of which Triton knows: kl would spill on sm_100."""
    most = _BLOCK // 2 if taught and vocab % 16 else _BLOCK
    return min(most, triton.next_power_of_2(vocab))


@triton.jit
def _row_kernel(  # type: ignore[no-untyped-def]
    logits,  # [C, V]
    grad,  # [C, V], over the logits or elsewhere
    teacher,  # [C, V], or None
    labels,  # [C]
    scale,  # [], or None for 1
    weights,  # [C], or None for 1
    losses,  # [C]
    correct,  # [C]
    logits_stride,  # and the teacher's
    grad_stride,
    vocab,
    IGNORE: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    TARGET: tl.constexpr,  # None without a teacher
    SHARE: tl.constexpr,  # 0.0 without a teacher
    NEED_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row; the math is that of `token_losses` and `soft_targets`."""
    row = tl.program_id(0).to(tl.int64)
    x_row, g_row = logits + row * logits_stride, grad + row * grad_stride
    y = tl.load(labels + row)
    if y == IGNORE:
        tl.store(losses + row, 0.0)
        tl.store(correct + row, 0)
        if NEED_GRAD:
            _write_zeros(g_row, vocab, BLOCK)
    else:
        dtype: tl.constexpr = losses.dtype.element_ty
        exists = (y >= 0) & (y < vocab)
        target = _capped(tl.load(x_row + y, exists, float("nan")).to(dtype), SOFTCAP)
        top, sums, mean, rivals = _read(x_row, y, target, vocab, dtype, SOFTCAP, SMOOTHING, BLOCK)
        lse = top + tl.log(sums)
        loss = lse - target
        if SMOOTHING > 0:
            loss += SMOOTHING * (target - mean)
        of_q = tl.full([], 1.0, dtype)
        t_row, t_top, of_t, of_taught = x_row, top, of_q, of_q  # for a teacher alone
        if TARGET is not None:
            t_row = teacher + row * logits_stride
            soft, f, g, t_top, of_t = _compare(
                x_row, t_row, top, sums, lse, vocab, dtype, SOFTCAP, TARGET, BLOCK
            )
            loss += SHARE * (soft - loss)
            of_q += SHARE * (f - 1)
            of_taught = SHARE * g
        loss += Z_LOSS * lse * lse
        weight = _factor(weights, row, dtype)
        tl.store(losses + row, loss * weight)
        tl.store(correct + row, (rivals == 0).to(tl.int32))
        if NEED_GRAD:
            of_q += 2 * Z_LOSS * lse
            factor = weight * _factor(scale, 0, dtype)
            of_row = (top, 1 / sums, of_q / sums, t_top, of_t, of_taught, factor)
            rows = (x_row, g_row, t_row)
            _write(rows, y, of_row, vocab, dtype, SOFTCAP, SMOOTHING, TARGET, SHARE, BLOCK)


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
    top, sums = tl.full([BLOCK], float("-inf"), dtype), tl.zeros([BLOCK], dtype)
    total, rivals = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = _load(x_row, cols, vocab, dtype, SOFTCAP)
        old, new = _exps(x, top)
        sums = sums * old + new
        top = tl.maximum(top, x)
        rivals += ((cols != y) & (cols < vocab) & ~(x < target)).to(tl.int32)  # NaN is a rival
        if SMOOTHING > 0:
            total += tl.where(cols < vocab, x, 0.0)
    highest = tl.max(top, 0)
    sums = tl.sum(sums * tl.exp(top - highest), 0)
    return highest, sums, tl.sum(total, 0) / vocab, tl.sum(rivals, 0)


@triton.jit
def _compare(  # type: ignore[no-untyped-def]
    x_row,
    t_row,
    top,
    sums,
    lse,
    vocab,
    dtype: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss against the teacher, and f, g, the teacher's maximum and 1 / its sum, from which the
    loss' gradient is f q - g t, t being p for kl, else q where q <= p."""
    t_top, t_sums, distance = _read_teacher(x_row, t_row, vocab, dtype, SOFTCAP, TARGET, BLOCK)
    of_t = 1 / t_sums
    f = tl.full([], 1.0, dtype)
    g = f
    if TARGET == "kl":
        soft = distance * of_t - t_top - tl.log(t_sums) + lse
    else:
        of_rows = (top, 1 / sums, t_top, of_t)
        accepted, f = _overlap(x_row, t_row, of_rows, vocab, dtype, SOFTCAP, BLOCK)
        if TARGET == "tv":
            soft = 1 - accepted
        else:
            soft = -tl.log(accepted)
            g = 1 / accepted
            f *= g
    return soft, f, g, t_top, of_t


@triton.jit
def _read_teacher(  # type: ignore[no-untyped-def]
    x_row,
    t_row,
    vocab,
    dtype: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Maximum and sum of the teacher's exp(t - maximum), and for kl that of their products with
    t - x."""
    top, sums = tl.full([BLOCK], float("-inf"), dtype), tl.zeros([BLOCK], dtype)
    distance = tl.zeros([BLOCK], dtype)
    for start in range(0, vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        t = _load(t_row, cols, vocab, dtype, SOFTCAP)
        old, new = _exps(t, top)
        sums = sums * old + new
        top = tl.maximum(top, t)
        if TARGET == "kl":
            x = _load(x_row, cols, vocab, dtype, SOFTCAP)
            distance = distance * old + new * tl.where(cols < vocab, t - x, 0.0)
    highest = tl.max(top, 0)
    shift = tl.exp(top - highest)
    return highest, tl.sum(sums * shift, 0), tl.sum(distance * shift, 0)


@triton.jit
def _overlap(  # type: ignore[no-untyped-def]
    x_row,
    t_row,
    of_rows,
    vocab,
    dtype: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of min(p, q), and of q where q <= p."""
    x_top, of_x, t_top, of_t = of_rows
    accepted, below = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
    for start in range(0, vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        q = tl.exp(_load(x_row, cols, vocab, dtype, SOFTCAP) - x_top) * of_x
        p = tl.exp(_load(t_row, cols, vocab, dtype, SOFTCAP) - t_top) * of_t
        accepted += tl.minimum(p, q)
        below += tl.where(q <= p, q, 0.0)
    return tl.maximum(tl.sum(accepted, 0), _TINY), tl.sum(below, 0)


@triton.jit
def _write(  # type: ignore[no-untyped-def]
    rows,
    y,
    of_row,
    vocab,
    dtype: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    TARGET: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Last reading, and the gradient."""
    x_row, g_row, t_row = rows
    top, of_x, of_q, t_top, of_t, of_taught, factor = of_row
    even = tl.full([], (1 - SHARE) * SMOOTHING, dtype) / vocab
    for start in range(0, vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = _load(x_row, cols, vocab, dtype, SOFTCAP)
        tl.debug_barrier()  # (a barrier of the block's threads, not for debugging alone)
        e = tl.exp(x - top)
        g = e * of_q
        if SMOOTHING > 0:
            g -= even
        g = tl.where(cols == y, g - (1 - SHARE) * (1 - SMOOTHING), g)
        if TARGET is not None:
            taught = tl.exp(_load(t_row, cols, vocab, dtype, SOFTCAP) - t_top) * of_t  # p
            if TARGET != "kl":
                q = e * of_x
                taught = tl.where(q <= taught, q, 0.0)
            g -= of_taught * taught
        if SOFTCAP is not None:
            g *= 1 - (x / SOFTCAP) * (x / SOFTCAP)
        tl.store(g_row + cols, (g * factor).to(g_row.dtype.element_ty), cols < vocab)


@triton.jit
def _write_zeros(g_row, vocab, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    for start in range(0, vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        tl.store(g_row + cols, tl.zeros([BLOCK], g_row.dtype.element_ty), cols < vocab)


@triton.jit
def _exps(x, top):  # type: ignore[no-untyped-def]
    """exp(top - m) and exp(x - m), m the larger of the two: one of them is 1, so it takes one
    exponential. Beyond the last column, where x is -inf, top may be -inf too: 0 in place of NaN."""
    e = tl.where(x == float("-inf"), 0.0, tl.exp(-tl.abs(x - top)))
    return tl.where(x > top, e, 1.0), tl.where(x > top, 1.0, e)


@triton.jit
def _load(x_row, cols, vocab, dtype: tl.constexpr, SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logits of some columns after the soft cap; -inf beyond the last one."""
    x = tl.load(x_row + cols, cols < vocab, float("-inf")).to(dtype)
    if SOFTCAP is not None:
        x = tl.where(cols < vocab, _capped(x, SOFTCAP), float("-inf"))
    return x


@triton.jit
def _factor(pointer, index, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """pointer[index], or 1 where there is nothing."""
    one = tl.full([], 1.0, dtype)
    return one if pointer is None else one * tl.load(pointer + index)


@triton.jit
def _capped(x, SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """SOFTCAP * tanh(x / SOFTCAP)."""
    if SOFTCAP is not None:
        x = SOFTCAP * (1 - 2 / (1 + tl.exp(x * (2 / SOFTCAP))))
    return x
