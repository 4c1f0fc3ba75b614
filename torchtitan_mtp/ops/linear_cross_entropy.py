"""`linear_cross_entropy`: projection to the vocabulary and cross-entropy of n heads in one op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchtitan_mtp.errors import UserError
from torchtitan_mtp.ops.backends import BACKENDS
from torchtitan_mtp.ops.chunked import LossOutput
from torchtitan_mtp.ops.token_losses import LossOptions


def linear_cross_entropy(
    hiddens: Sequence[Tensor] | Tensor,
    weight: Tensor,
    labels: Tensor,
    head_scales: Tensor | None = None,
    *,
    row_weights: Tensor | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    chunk_rows: int | None = None,
    compile: bool = False,
    backend: str = "chunked",
) -> LossOutput:
    """Cross-entropy of n heads that share one unembedding, without their whole logits.

    For every head k and row i with a valid label y, with u = hiddens[k][i] @ weight.T,
    x = softcap * tanh(u / softcap) (x = u without a soft cap) and lse = logsumexp(x):

        token loss = (1 - label_smoothing) * (lse - x[y]) + label_smoothing * (lse - mean(x))
                     + z_loss * lse**2
        loss = sum_k head_scales[k] * sum_i row_weights[i, k] * token loss

    The losses are SUMMED, never divided: put weight_k / valid_k, with the global number of valid
    labels, into `head_scales`. So an all-ignored batch gives 0 and zero gradients, and
    accumulation over micro-batches and ranks is exact.

    The gradients of the default backend are computed in the forward, and one backward uses them up.

    Args:
        hiddens: n tensors [N, D], or one [n, N, D].
        weight: [V, D], the unembedding.
        labels: [N, n] int64 in 0..V-1, or `ignore_index`.
        head_scales: [n] float32, factors of the heads' losses in `loss`; None: all 1.
        row_weights: [N] or [N, n], factors of the rows' losses, constants to autograd; None: all
            1. Valid and correct labels are counted without them.
        ignore_index: the label of rows that do not count.
        z_loss: coefficient of lse**2 (PaLM, arXiv 2204.02311, section 5).
        softcap: cap of the logits (Gemma 2, arXiv 2408.00118, section 2); None: none.
        label_smoothing: share of the uniform distribution in the target (arXiv 1512.00567).
        chunk_rows: rows whose logits are alive at a time; None: chosen from shapes and device.
        compile: let torch.compile fuse the passes over a chunk's logits; "chunked" alone.
        backend: "chunked" (this project's), "naive" (whole logits) or "torch".

    Raises:
        UserError: shapes, dtypes or devices that do not fit, an unknown or missing backend, or an
            option that the backend does not have; one line that names it.
    """
    heads = _check(hiddens, weight, labels, head_scales)
    if row_weights is not None:
        row_weights = _check_row_weights(row_weights, labels, weight)
    options = LossOptions(ignore_index, z_loss, softcap, label_smoothing, chunk_rows, compile)
    _check_options(options)
    if backend not in BACKENDS:
        raise UserError(
            f"linear_cross_entropy: backend is {backend!r}; expected one of {', '.join(BACKENDS)}"
        )
    if head_scales is None:
        head_scales = torch.ones(len(heads), device=weight.device)
    head_scales = head_scales.detach()
    return BACKENDS[backend](heads, weight, labels, head_scales, row_weights, options)


def _check(
    hiddens: Sequence[Tensor] | Tensor, weight: Tensor, labels: Tensor, scales: Tensor | None
) -> tuple[Tensor, ...]:
    """The hiddens as a tuple of [N, D], after a check of every shape, dtype and device."""
    if isinstance(hiddens, Tensor):
        if hiddens.dim() != 3:
            raise _error("hiddens", hiddens, "n tensors [N, D] or one [n, N, D]")
        hiddens = hiddens.unbind(0)
    heads = tuple(hiddens)
    if not heads:
        raise UserError("linear_cross_entropy: hiddens is empty; expected at least one [N, D]")
    if weight.dim() != 2:
        raise _error("weight", weight, "[V, D]")
    n_rows, dim = heads[0].shape[0], weight.shape[1]
    for k, hidden in enumerate(heads):
        if tuple(hidden.shape) != (n_rows, dim):
            raise _error(f"hiddens[{k}]", hidden, f"[N, D] = [{n_rows}, {dim}]")
        _check_device(f"hiddens[{k}]", hidden, weight)
        if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
            raise UserError(
                f"linear_cross_entropy: hiddens[{k}] is {hidden.dtype} and weight {weight.dtype}; "
                "expected one dtype (or autocast)"
            )
    if tuple(labels.shape) != (n_rows, len(heads)):
        raise _error("labels", labels, f"[N, n] = [{n_rows}, {len(heads)}]")
    _check_device("labels", labels, weight)
    if labels.dtype != torch.int64:
        raise UserError(f"linear_cross_entropy: labels is {labels.dtype}; expected torch.int64")
    if scales is not None and tuple(scales.shape) != (len(heads),):
        raise _error("head_scales", scales, f"[n] = [{len(heads)}]")
    if scales is not None:
        _check_device("head_scales", scales, weight)
    return heads


def _check_device(name: str, tensor: Tensor, weight: Tensor) -> None:
    if tensor.device != weight.device:
        raise UserError(
            f"linear_cross_entropy: {name} is on {tensor.device} and weight on {weight.device}; "
            "expected one device"
        )


def _check_row_weights(row_weights: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """The weights [N, n], detached."""
    shape = tuple(row_weights.shape)
    if shape not in (tuple(labels.shape), tuple(labels.shape[:1])):
        n_rows, n = labels.shape
        raise _error("row_weights", row_weights, f"[N] = [{n_rows}] or [N, n] = [{n_rows}, {n}]")
    _check_device("row_weights", row_weights, weight)
    if len(shape) == 1:
        row_weights = row_weights.unsqueeze(1).expand(labels.shape)
    return row_weights.detach()


def _check_options(options: LossOptions) -> None:
    if options.softcap is not None and options.softcap <= 0:
        raise UserError(f"linear_cross_entropy: softcap is {options.softcap}; expected > 0 or None")
    if not 0 <= options.label_smoothing <= 1:
        raise UserError(
            f"linear_cross_entropy: label_smoothing is {options.label_smoothing}; expected 0 to 1"
        )
    if options.z_loss < 0:
        raise UserError(f"linear_cross_entropy: z_loss is {options.z_loss}; expected >= 0")
    if options.chunk_rows is not None and options.chunk_rows < 1:
        raise UserError(
            f"linear_cross_entropy: chunk_rows is {options.chunk_rows}; expected >= 1 or None"
        )


def _error(name: str, tensor: Tensor, expected: str) -> UserError:
    return UserError(f"linear_cross_entropy: {name} is {list(tensor.shape)}; expected {expected}")
