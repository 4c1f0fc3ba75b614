"""Losses of a chunk of tokens from its logits; the logits' gradient overwrites them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchtitan_mtp.errors import UserError, import_optional
from torchtitan_mtp.ops.soft_targets import compare_, read_teacher_, rows_at_once, target_losses
from torchtitan_mtp.ops.vocabulary import VocabularyShard, over_ranks

PASSES = ("eager", "compiled", "triton")


class LossOptions(NamedTuple):
    """What a token's loss is and how it is computed (`linear_cross_entropy`), for all heads.

    Attributes:
        ignore_index: the label of rows that do not count.
        z_loss: coefficient of lse**2 (PaLM, arXiv 2204.02311, section 5).
        softcap: cap of the logits (Gemma 2, arXiv 2408.00118, section 2).
        label_smoothing: share of the uniform distribution in the target (arXiv 1512.00567).
        chunk_rows: rows of logits alive at a time; None: by shapes and device.
        passes: what runs the passes over a chunk's logits, of `PASSES`.
        bf16_logits: their product rounds them to bfloat16; not with eager passes.
        target_loss: against a teacher, of `TARGET_LOSSES`; None: labels only.
        target_weight: its share; the rest is the label's cross-entropy.
        compile_backend: torch.compile's, of compiled passes.
    """

    ignore_index: int = -100
    z_loss: float = 0.0
    softcap: float | None = None
    label_smoothing: float = 0.0
    chunk_rows: int | None = None
    passes: str = "eager"
    bf16_logits: bool = False
    target_loss: str | None = None
    target_weight: float = 1.0
    compile_backend: str = "inductor"


class LossSums(NamedTuple):
    """Sums over valid rows, of a chunk or of a head; [] each."""

    loss_sum: Tensor  # in the accumulation dtype
    valid: Tensor  # int64
    correct: Tensor  # int64


def chunk_losses(
    logits: Tensor,
    labels: Tensor,
    options: LossOptions,
    scale: Tensor | None,
    weights: Tensor | None,
    dtype: torch.dtype,
    need_grad: bool,
    teacher: Tensor | None = None,
    vocabulary: VocabularyShard | None = None,
) -> tuple[LossSums, Tensor, Tensor | None]:
    """Losses of a chunk by `options.passes`, and ``scale`` times its logits' gradient [C, V] in
    ``dtype`` as ``factor * G``, factor [C, 1] or None for 1. The rest as in `token_losses`.

    vocabulary: of which the logits' tokens are a rank's; None: they are all. Its loss has one form,
    compiled or not.
    """
    if options.passes == "triton" and vocabulary is not None:
        raise UserError(
            'loss.passes is "triton" and the vocabulary is spread over ranks; expected "compiled" '
            'or "eager"'
        )
    if options.passes == "triton":
        kernel = import_optional("torchtitan_mtp.ops.triton_losses", _WITHOUT_TRITON)
        how = (options, scale, weights, dtype, need_grad, teacher)
        return *kernel.triton_token_losses(logits, labels, *how), None
    if options.passes == "compiled" or vocabulary is not None:
        passes = traceable_token_losses
        if options.passes == "compiled":
            passes = compiled_token_losses(options.compile_backend)
        return *passes(logits, labels, options, scale, weights, dtype, teacher, vocabulary), None
    part, grad, factor = token_losses(logits, labels, options, need_grad, weights, teacher)
    if scale is not None:
        factor = factor * scale.to(factor.dtype)
    if dtype == grad.dtype or not need_grad:
        return part, grad, factor
    # The pass over [C, V] that rounds applies the factor as well.
    return part, torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype)), None


_WITHOUT_TRITON = (
    'loss.passes is "triton" and the package triton is not installed; pip install triton, or '
    'choose "compiled"'
)


def token_losses(
    logits: Tensor,
    labels: Tensor,
    options: LossOptions,
    need_grad: bool,
    weights: Tensor | None = None,
    teacher: Tensor | None = None,
) -> tuple[LossSums, Tensor, Tensor]:
    """Losses of a chunk, and its logits' gradient as ``factor * G``, factor [C, 1], G [C, V].

    ``logits`` [C, V] is overwritten; G lives in it. So are the ``teacher``'s logits [C, V].
    ``weights`` [C] multiply the rows' losses. For the loss of a row with label y,

        (1 - a) (lse - x_y) + a (lse - mean(x)) + z lse^2,    lse = logsumexp(x), a = smoothing

    the gradient in x_j is  f p_j - (1 - a) [j = y] - a / V  with  f = 1 + 2 z lse  and
    p_j = e_j / s, which is (f / s) * (e_j - (s / f) ((1 - a) [j = y] + a / V)). A soft cap
    x = c tanh(u / c) adds the factor 1 - (x / c)^2. With a teacher, the loss against it takes the
    share w of all that is before z lse^2.
    """
    is_valid, y = _targets(labels, options)
    if teacher is None:
        rows = _row_losses_(logits, y, options, need_grad)
    else:
        count = rows_at_once(logits)
        room = torch.empty_like(teacher[:count])
        groups = zip(*(t.split(count) for t in (logits, y, teacher)), strict=True)
        found = [_row_losses_(x, y, options, need_grad, t, room) for x, y, t in groups]
        columns = zip(*found, strict=True)
        whole: list[Any] = [None if of[0] is None else torch.cat(of) for of in columns]
        rows = _Rows(*whole)
    part = _sums(*rows[:-1], is_valid, options, weights)
    factor = rows.factor.masked_fill(~is_valid.unsqueeze(1), 0)
    return part, logits, factor if weights is None else factor * weights.unsqueeze(1)


class _Rows(NamedTuple):
    """What is known of each row; [C, 1] each."""

    lse: Tensor
    target: Tensor  # the label's logit
    mean: Tensor | None  # of the logits, with label smoothing
    soft: Tensor | None  # loss against a teacher
    correct: Tensor  # bool
    factor: Tensor  # of G, for a label that counts


def _row_losses_(
    logits: Tensor,
    y: Tensor,
    options: LossOptions,
    need_grad: bool,
    teacher: Tensor | None = None,
    room: Tensor | None = None,
) -> _Rows:
    """All passes over some rows of a chunk: G in the place of `logits`. y: labels [C, 1]."""
    vocab, smoothing = logits.shape[1], options.label_smoothing
    slope, kind = None, options.target_loss
    if options.softcap is not None:
        logits.div_(options.softcap).tanh_()
        if need_grad:
            slope = logits.square().neg_().add_(1)  # [C, V]
        logits.mul_(options.softcap)
    taught = None
    if teacher is not None and room is not None:
        taught = read_teacher_(teacher, logits, room, kind, options.softcap)
    target = logits.gather(1, y)  # [C, 1]
    mean = logits.mean(1, keepdim=True) if smoothing else None
    # The label's logit is masked while the maximum is taken: so `correct` needs no argmax.
    others = logits.scatter_(1, y, -torch.inf).amax(1, keepdim=True)  # [C, 1]
    logits.scatter_(1, y, target)
    maximum = torch.maximum(others, target)
    exps = logits.sub_(maximum).exp_()  # [C, V]
    sums = exps.sum(1, keepdim=True)  # [C, 1]
    lse = maximum + sums.log()
    soft, hard = None, 1.0  # loss against the teacher [C, 1]; share of the label's
    factor = 1 + 2 * options.z_loss * lse  # [C, 1]
    if taught is not None:
        w = options.target_weight
        soft, f, g = compare_(exps, sums, lse, taught, kind)
        hard, factor = 1 - w, factor - w + w * f
        exps.addcmul_(taught.exps, w * g / factor, value=-1)
    if need_grad and hard:
        per_row = hard * sums / factor
        if smoothing:
            exps.sub_(per_row * (smoothing / vocab))
        exps.scatter_add_(1, y, per_row * (smoothing - 1))
    if slope is not None:
        exps.mul_(slope)
    return _Rows(lse, target, mean, soft, target > others, factor / sums)


@functools.cache
def compiled_token_losses(backend: str) -> Callable[..., tuple[LossSums, Tensor]]:
    """`traceable_token_losses`, compiled."""
    return torch.compile(traceable_token_losses, backend=backend, fullgraph=True)


def traceable_token_losses(
    logits: Tensor,
    labels: Tensor,
    options: LossOptions,
    scale: Tensor | None,
    weights: Tensor | None,
    dtype: torch.dtype,
    teacher: Tensor | None = None,
    vocabulary: VocabularyShard | None = None,
) -> tuple[LossSums, Tensor]:
    """As `token_losses`, in a form that torch.compile fuses into three passes over [C, V], of which
    two only read; between them the ranks of a ``vocabulary`` meet.

    Returns the sums, and ``scale`` times the whole gradient [C, V] in ``dtype``; it overwrites
    ``logits`` where that is their dtype.
    """
    size, smoothing, cap = logits.shape[1], options.label_smoothing, options.softcap
    first, total = (0, size) if vocabulary is None else vocabulary[1:]
    acc = torch.promote_types(logits.dtype, torch.float32)
    is_valid, y = _targets(labels, options)
    column = y if vocabulary is None else (y - first).clamp(0, size - 1)
    target, x = logits.gather(1, column).to(acc), logits.to(acc)  # [C, 1], [C, V]
    t = [] if teacher is None else [teacher.to(acc)]
    if cap is not None:
        target, x, *t = [cap * torch.tanh(u / cap) for u in (target, x, *t)]
    is_target = torch.arange(first, first + size, device=logits.device) == y  # [C, V]
    others = x.masked_fill(is_target, -torch.inf).amax(1, keepdim=True)  # [C, 1]
    if vocabulary is not None:
        target = target.masked_fill(column + first != y, -torch.inf)  # another rank has it
    tops = [others, target, *[u.amax(1, keepdim=True) for u in t]]
    others, target, *t_top = over_ranks("max", tops, vocabulary)
    maximum = torch.maximum(others, target)
    exps = (x - maximum).exp()
    terms = [exps, *[(u - t_top[0]).exp() for u in t], *([x] if smoothing else [])]
    sums, *more = over_ranks("sum", [u.sum(1, keepdim=True) for u in terms], vocabulary)
    lse = maximum + sums.log()
    mean = more[-1] / total if smoothing else None
    soft, d_soft, hard = None, None, 1.0
    if t:
        log_p = t[0] - (t_top[0] + more[0].log())
        soft, d_soft = target_losses(x - lse, log_p, options.target_loss, vocabulary)
        hard = 1 - options.target_weight
    correct = (target > others) & ~lse.isnan()  # (a maximum over ranks may have lost a NaN)
    part = _sums(lse, target, mean, soft, correct, is_valid, options, weights)
    grad = exps * ((hard + 2 * options.z_loss * lse) / sums) - hard * smoothing / total
    grad = torch.where(is_target, grad - hard * (1 - smoothing), grad)
    if d_soft is not None:
        grad = grad + options.target_weight * d_soft
    if cap is not None:
        grad = grad * (1 - (x / cap).square())
    row = is_valid.to(acc)
    for factor in (scale, weights):
        row = row if factor is None else row * factor
    grad = (grad * row.unsqueeze(1)).to(dtype)
    return part, logits.copy_(grad) if dtype == logits.dtype else grad


def _targets(labels: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """Which labels count [C], and the labels [C, 1], with 0 for those that don't."""
    is_valid = labels != options.ignore_index
    return is_valid, labels.masked_fill(~is_valid, 0).unsqueeze(1)


def _sums(
    lse: Tensor,
    target: Tensor,
    mean: Tensor | None,
    soft: Tensor | None,
    correct: Tensor,
    is_valid: Tensor,
    options: LossOptions,
    weights: Tensor | None,
) -> LossSums:
    """From what is known of each row: lse, the label's logit, their mean, the loss against a
    teacher, `correct` [C, 1]."""
    losses = lse - target
    if mean is not None:
        losses = losses + options.label_smoothing * (target - mean)
    if soft is not None:
        losses = torch.lerp(losses, soft, options.target_weight)
    if options.z_loss:
        losses = losses + options.z_loss * lse.square()
    losses = losses.squeeze(1).masked_fill(~is_valid, 0)  # [C]
    if weights is not None:
        losses = losses * weights
    return LossSums(losses.sum(), is_valid.sum(), (correct.squeeze(1) & is_valid).sum())
