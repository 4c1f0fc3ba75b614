"""The backends of `linear_cross_entropy` by name: ours, plain torch, torch's own.

Only "chunked" and "naive" have every option.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan_mtp.errors import UserError
from torchtitan_mtp.ops.autograd import chunked_linear_cross_entropy
from torchtitan_mtp.ops.chunked import LossInput, LossOutput, accumulation_dtype
from torchtitan_mtp.ops.soft_targets import target_losses


def naive(x: LossInput) -> LossOutput:
    """Whole logits in float32 and plain autograd: the reference."""
    sums, correct, options = [], [], x.options
    for k, hidden in enumerate(x.hiddens):
        logits = F.linear(hidden, x.weight).to(accumulation_dtype(hidden.dtype))  # [N, V]
        if options.softcap is not None:
            logits = options.softcap * torch.tanh(logits / options.softcap)
        y = x.labels[:, k]
        losses = F.cross_entropy(
            logits,
            y,
            ignore_index=options.ignore_index,
            label_smoothing=options.label_smoothing,
            reduction="none",
        )  # [N]
        if x.teacher is not None and (ahead := x.first + k):
            # (What comes around the end has no label.)
            taught = F.linear(x.teacher, x.weight.detach()).roll(-ahead, 0).to(logits.dtype)
            soft = target_losses(logits, taught, options.target_loss, options.softcap)[0]
            soft = soft.squeeze(1).masked_fill(y == options.ignore_index, 0)
            losses = torch.lerp(losses, soft, options.target_weight)
        if options.z_loss:
            lse = torch.logsumexp(logits, -1).masked_fill(y == options.ignore_index, 0)
            losses = losses + options.z_loss * lse.square()
        if x.row_weights is not None:
            losses = losses * x.row_weights[:, k]
        sums.append(losses.sum())
        correct.append(_count_correct(logits.detach(), y, options.ignore_index))
    return _result(sums, x, torch.stack(correct))


def _count_correct(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """How many valid labels [N] have a logit above every other of [N, V]; ties are not."""
    is_valid = labels != ignore_index
    y = labels.masked_fill(~is_valid, 0).unsqueeze(1)
    others = logits.scatter(1, y, -torch.inf).amax(1)
    return ((logits.gather(1, y).squeeze(1) > others) & is_valid).sum()


def torch_chunked(x: LossInput) -> LossOutput:
    """`torch.nn.functional.linear_cross_entropy` (torch 2.13 on), chunked."""
    if not hasattr(F, "linear_cross_entropy"):
        raise UserError(
            "linear_cross_entropy: backend 'torch' needs torch >= 2.13, found "
            f"{torch.__version__}; use 'chunked'"
        )
    names, options = ("z_loss", "softcap", "label_smoothing"), x.options
    missing = [
        f"{name} (it is {getattr(options, name)})" for name in names if getattr(options, name)
    ]
    for name in ("row_weights", "teacher"):
        if getattr(x, name) is not None:
            missing.insert(0, name)
    if missing:
        raise UserError(f"linear_cross_entropy: backend 'torch' has no {missing[0]}; use 'chunked'")
    chunking = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=options.chunk_rows)
    sums = [
        F.linear_cross_entropy(
            hidden,
            x.weight,
            x.labels[:, k],
            reduction="sum",
            ignore_index=options.ignore_index,
            options=chunking,
        )
        for k, hidden in enumerate(x.hiddens)
    ]
    return _result(sums, x)


def _result(sums: list[Tensor], x: LossInput, correct: Tensor | None = None) -> LossOutput:
    """LossOutput from the heads' loss sums; `correct` is -1 where a backend does not count it."""
    loss_sum = torch.stack(sums).to(accumulation_dtype(sums[0].dtype))  # [n]
    loss = (loss_sum * x.head_scales).sum()
    valid = (x.labels != x.options.ignore_index).sum(0)  # [n]
    if correct is None:
        correct = torch.full_like(valid, -1)
    return LossOutput(loss, loss_sum.detach(), valid, correct)


BACKENDS: dict[str, Callable[[LossInput], LossOutput]] = {
    "chunked": chunked_linear_cross_entropy,
    "naive": naive,
    "torch": torch_chunked,
}
