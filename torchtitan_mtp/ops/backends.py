"""The backends of `linear_cross_entropy` by name: ours, plain torch, other libraries'.

Each takes (hiddens, weight [V, D], labels [N, n], head_scales [n], row_weights [N, n] or None,
options) and returns (loss, loss_sum [n], valid [n], correct [n]). Only "chunked" and "naive" have
every option.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan_mtp.errors import UserError
from torchtitan_mtp.ops.all_heads import chunked_linear_cross_entropy
from torchtitan_mtp.ops.chunked import accumulation_dtype
from torchtitan_mtp.ops.token_losses import LossOptions

Heads = tuple[Tensor, ...]
Result = tuple[Tensor, Tensor, Tensor, Tensor]


def naive(
    hiddens: Heads,
    weight: Tensor,
    labels: Tensor,
    head_scales: Tensor,
    row_weights: Tensor | None,
    options: LossOptions,
) -> Result:
    """Whole logits in float32 and plain autograd: the reference."""
    sums, correct = [], []
    for k, hidden in enumerate(hiddens):
        logits = F.linear(hidden, weight)  # [N, V]
        logits = logits.to(accumulation_dtype(hidden.dtype))
        if options.softcap is not None:
            logits = options.softcap * torch.tanh(logits / options.softcap)
        y = labels[:, k]
        losses = F.cross_entropy(
            logits,
            y,
            ignore_index=options.ignore_index,
            label_smoothing=options.label_smoothing,
            reduction="none",
        )  # [N]
        if options.z_loss:
            lse = torch.logsumexp(logits, -1).masked_fill(y == options.ignore_index, 0)
            losses = losses + options.z_loss * lse.square()
        if row_weights is not None:
            losses = losses * row_weights[:, k]
        sums.append(losses.sum())
        correct.append(_count_correct(logits.detach(), y, options.ignore_index))
    return _result(sums, labels, head_scales, options, torch.stack(correct))


def _count_correct(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """How many valid labels [N] have a logit above every other of [N, V]; ties are not."""
    is_valid = labels != ignore_index
    y = labels.masked_fill(~is_valid, 0).unsqueeze(1)
    others = logits.scatter(1, y, -torch.inf).amax(1)
    return ((logits.gather(1, y).squeeze(1) > others) & is_valid).sum()


def torch_chunked(
    hiddens: Heads,
    weight: Tensor,
    labels: Tensor,
    head_scales: Tensor,
    row_weights: Tensor | None,
    options: LossOptions,
) -> Result:
    """`torch.nn.functional.linear_cross_entropy` (torch 2.13 on), chunked."""
    if not hasattr(F, "linear_cross_entropy"):
        raise UserError(
            "linear_cross_entropy: backend 'torch' needs torch >= 2.13, found "
            f"{torch.__version__}; use 'chunked'"
        )
    _refuse("torch", row_weights, options, "z_loss", "softcap", "label_smoothing")
    chunking = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=options.chunk_rows)
    sums = [
        F.linear_cross_entropy(
            hidden,
            weight,
            labels[:, k],
            reduction="sum",
            ignore_index=options.ignore_index,
            options=chunking,
        )
        for k, hidden in enumerate(hiddens)
    ]
    return _result(sums, labels, head_scales, options)


@torch.compiler.disable  # Liger is silently wrong under torch.compile with ignored labels
def liger(
    hiddens: Heads,
    weight: Tensor,
    labels: Tensor,
    head_scales: Tensor,
    row_weights: Tensor | None,
    options: LossOptions,
) -> Result:
    """Liger-Kernel's fused linear cross-entropy (Triton), accumulating in float32."""
    _refuse("liger", row_weights, options, "chunk_rows")
    module = _import("liger", "liger_kernel.transformers", "liger-kernel", weight)
    loss_of = module.LigerFusedLinearCrossEntropyLoss(
        ignore_index=options.ignore_index,
        lse_square_scale=options.z_loss,
        label_smoothing=options.label_smoothing,
        softcap=options.softcap,
        reduction="sum",
        accum_dtype=torch.float32,
    )
    sums = [loss_of(weight, hidden, labels[:, k].contiguous()) for k, hidden in enumerate(hiddens)]
    return _result(sums, labels, head_scales, options)


@torch.compiler.disable
def cce(
    hiddens: Heads,
    weight: Tensor,
    labels: Tensor,
    head_scales: Tensor,
    row_weights: Tensor | None,
    options: LossOptions,
) -> Result:
    """Apple's cut cross-entropy (Triton), exact: no gradient is filtered out."""
    _refuse("cce", row_weights, options, "z_loss", "label_smoothing", "chunk_rows")
    module = _import("cce", "cut_cross_entropy", "cut-cross-entropy", weight)
    sums = [
        module.linear_cross_entropy(
            hidden.contiguous(),
            weight,
            labels[:, k].contiguous(),
            ignore_index=options.ignore_index,
            softcap=options.softcap,
            reduction="sum",
            filter_eps=None,
        )
        for k, hidden in enumerate(hiddens)
    ]
    return _result(sums, labels, head_scales, options)


def _import(backend: str, module: str, package: str, weight: Tensor) -> Any:
    """The backend's library, or one line that says what is missing."""
    if not weight.is_cuda:
        raise UserError(
            f"linear_cross_entropy: backend {backend!r} runs on CUDA only, weight is on "
            f"{weight.device}; use 'chunked'"
        )
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"linear_cross_entropy: backend {backend!r} needs the package {package} ({error}); "
            "install it or use 'chunked'"
        ) from error


def _refuse(backend: str, row_weights: Tensor | None, options: LossOptions, *names: str) -> None:
    """An error for row weights, or for the first of the options `names` not at its default."""
    if row_weights is not None:
        raise UserError(
            f"linear_cross_entropy: backend {backend!r} has no row_weights; use 'chunked'"
        )
    for name in names:
        value = getattr(options, name)
        if value != LossOptions._field_defaults[name]:
            raise UserError(
                f"linear_cross_entropy: backend {backend!r} has no {name} (it is {value}); "
                "use 'chunked'"
            )


def _result(
    sums: list[Tensor],
    labels: Tensor,
    head_scales: Tensor,
    options: LossOptions,
    correct: Tensor | None = None,
) -> Result:
    """Result from the heads' loss sums; `correct` is -1 where a backend does not count it."""
    loss_sum = torch.stack(sums).to(accumulation_dtype(sums[0].dtype))  # [n]
    loss = (loss_sum * head_scales).sum()
    valid = (labels != options.ignore_index).sum(0)  # [n]
    if correct is None:
        correct = torch.full_like(valid, -1)
    return loss, loss_sum.detach(), valid, correct


BACKENDS: dict[
    str, Callable[[Heads, Tensor, Tensor, Tensor, Tensor | None, LossOptions], Result]
] = {
    "chunked": chunked_linear_cross_entropy,
    "naive": naive,
    "torch": torch_chunked,
    "liger": liger,
    "cce": cce,
}
