"""`linear_cross_entropy`: projection to the vocabulary and cross-entropy of n heads in one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchtitan_mtp.errors import UserError
from torchtitan_mtp.ops.autograd import HeadsLoss, needs_gradient
from torchtitan_mtp.ops.chunked import LossOutput, fp16_gradient_scale
from torchtitan_mtp.ops.soft_targets import TARGET_LOSSES
from torchtitan_mtp.ops.token_losses import PASSES, LossOptions
from torchtitan_mtp.ops.vocabulary import VocabularyShard


def linear_cross_entropy(
    hiddens: Sequence[Tensor] | Tensor,
    weight: Tensor,
    labels: Tensor,
    head_scales: Tensor | None = None,
    options: LossOptions | None = None,
    *,
    row_weights: Tensor | None = None,
    teacher: Tensor | None = None,
    first: int = 0,
    vocabulary: VocabularyShard | None = None,
    **fields: Any,
) -> LossOutput:
    """Cross-entropy of n heads that share one unembedding, without their whole logits.

    For every head k and row i with a valid label y, with u = `hiddens[k][i] @ weight.T`,
    x = softcap * tanh(u / softcap) (x = u without a soft cap) and lse = logsumexp(x):

        token loss = (1 - label_smoothing) * (lse - x[y]) + label_smoothing * (lse - mean(x))
                     + z_loss * lse**2
        loss = sum_k head_scales[k] * sum_i row_weights[i, k] * token loss

    The losses are SUMMED, never divided: put weight_k / valid_k, with the global number of valid
    labels, into `head_scales`. So an all-ignored batch gives 0 and zero gradients, and
    accumulation over micro-batches and ranks is exact.

    The gradients are computed in the forward, and one backward uses them up.

    Args:
        hiddens: n tensors [N, D], or one [n, N, D].
        weight: [V, D], the unembedding.
        labels: [N, n] int64 in 0..V-1, or `ignore_index`.
        head_scales: [n] float32, factors of the heads' losses in `loss`; None: all 1.
        options: what a token's loss is and how it is computed; or instead its `fields` by name
            (z_loss=1e-4), with `LossOptions`' defaults.
        row_weights: [N] or [N, n], factors of the rows' losses, constants to autograd; None: all
            1. Valid and correct labels are counted without them.
        teacher: [N, D], states of head 0. Of head j = `first` + k > 0, row i with a label learns
            the distribution p that row i + j of these has under the same weight and soft cap, a
            constant to autograd: with w = target_weight and the losses of `soft_targets`,
            w * target_loss(p, softmax(x)) takes the place of the share w of all but the z-loss.
            None: labels alone.
        first: number of the first of these heads, from 0.
        vocabulary: of which `weight` has a rank's rows. All its ranks call this with the same
            hiddens and labels, and have to sum the hiddens' gradients.

    Raises:
        UserError: shapes, dtypes or devices that do not fit, or an option out of its range; one
            line that names it.
    """
    if options is None:
        options = LossOptions(**fields)
    elif fields:
        raise _error(f"options and {', '.join(fields)} are given", "one of them")
    _check_options(options)
    heads = _check_tensors(hiddens, weight, labels, head_scales, row_weights, teacher)
    if teacher is not None:
        if options.target_loss is None:
            raise _error("there is a teacher and no target_loss", " or ".join(TARGET_LOSSES))
        teacher = teacher.detach()
    if head_scales is None:
        head_scales = torch.ones(len(heads), device=weight.device)
    if row_weights is not None:
        columns = row_weights if row_weights.dim() == 2 else row_weights.unsqueeze(1)
        row_weights = columns.detach().expand(labels.shape)
    tensors = (weight, labels, head_scales.detach(), row_weights, teacher, None, first, vocabulary)
    scale = fp16_gradient_scale(head_scales.detach(), heads[0])
    needs_grad = [needs_gradient(tensor) for tensor in (weight, *heads)]
    return LossOutput(*HeadsLoss.apply(*tensors, options, scale, needs_grad, None, False, *heads))


def _check_options(options: LossOptions) -> None:
    cap, rows, target = options.softcap, options.chunk_rows, options.target_loss
    kinds, fused = (None, *TARGET_LOSSES), options.passes != "eager"
    for name, fits, expected in (
        ("softcap", cap is None or cap > 0, "> 0 or None"),
        ("label_smoothing", 0 <= options.label_smoothing <= 1, "0 to 1"),
        ("z_loss", options.z_loss >= 0, ">= 0"),
        ("target_loss", target in kinds, f"one of {', '.join(map(str, kinds))}"),
        ("target_weight", 0 <= options.target_weight <= 1, "0 to 1"),
        ("passes", options.passes in PASSES, f"one of {', '.join(PASSES)}"),
        ("bf16_logits", fused or not options.bf16_logits, 'False with passes="eager"'),
        ("chunk_rows", rows is None or rows >= 1, ">= 1 or None"),
    ):
        if not fits:
            raise _error(f"{name} is {getattr(options, name)!r}", expected)


def _check_tensors(
    hiddens: Sequence[Tensor] | Tensor,
    weight: Tensor,
    labels: Tensor,
    head_scales: Tensor | None,
    row_weights: Tensor | None,
    teacher: Tensor | None,
) -> tuple[Tensor, ...]:
    """The hiddens as a tuple of [N, D], after a check of every shape, device and dtype."""
    if isinstance(hiddens, Tensor) and hiddens.dim() != 3:
        raise _error(f"hiddens is {list(hiddens.shape)}", "n tensors [N, D] or one [n, N, D]")
    heads = tuple(hiddens)
    if not heads:
        raise _error("hiddens is empty", "at least one [N, D]")
    if weight.dim() != 2:
        raise _error(f"weight is {list(weight.shape)}", "[V, D]")
    n, n_rows, dim = len(heads), heads[0].shape[0], weight.shape[1]
    rows, table = [n_rows], [n_rows, n]
    for k, hidden in enumerate(heads):
        _check_tensor(f"hiddens[{k}]", hidden, weight, {"[N, D]": [n_rows, dim]})
        if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
            what = f"hiddens[{k}] is {hidden.dtype} and weight {weight.dtype}"
            raise _error(what, "one dtype (or autocast)")
    _check_tensor("labels", labels, weight, {"[N, n]": table})
    if labels.dtype != torch.int64:
        raise _error(f"labels is {labels.dtype}", "torch.int64")
    if head_scales is not None:
        _check_tensor("head_scales", head_scales, weight, {"[n]": [n]})
    if row_weights is not None:
        _check_tensor("row_weights", row_weights, weight, {"[N]": rows, "[N, n]": table})
    if teacher is not None:
        _check_tensor("teacher", teacher, weight, {"[N, D]": [n_rows, dim]})
    return heads


def _check_tensor(name: str, tensor: Tensor, weight: Tensor, shapes: dict[str, list[int]]) -> None:
    """An error for a shape that is none of `shapes`, or another device than the weight's."""
    shape = list(tensor.shape)
    if shape not in shapes.values():
        expected = " or ".join(f"{words} = {sizes}" for words, sizes in shapes.items())
        raise _error(f"{name} is {shape}", expected)
    if tensor.device != weight.device:
        raise _error(f"{name} is on {tensor.device} and weight on {weight.device}", "one device")


def _error(found: str, expected: str) -> UserError:
    return UserError(f"linear_cross_entropy: {found}; expected {expected}")
