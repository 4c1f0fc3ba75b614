"""One linear map for each group of rows: the matrix products of a mixture of experts.

    y[i] = weight[g] x[i]    for the rows i of group g, which lie together, group after group

`torch.nn.functional.grouped_mm` computes it in one kernel, without a synchronisation, for dtypes
and sizes that it supports; a loop over groups does it for others. Both are one custom op, whose
output shape does not depend on the groups' sizes: torch.compile does not break the graph at it, and
activation checkpointing can save its result.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_NATIVE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """x [R, in], weight [G, out, in] -> [R, out], differentiable in both.

    offsets: int32 [G], the end of each group, in rows; the last one is R. Groups may be empty.
    """
    result: Tensor = _product(x, weight, offsets)
    return result


@torch.library.custom_op("torchtitan_mtp::grouped_linear", mutates_args=())
def _product(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    if not len(x):  # of a rank whose experts got no row
        return x.new_empty(0, weight.shape[1])
    if _is_native(x.dtype, *weight.shape[1:]):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)
    parts = x.tensor_split(offsets.tolist()[:-1])  # waits for the device to know the sizes
    return torch.cat([part @ w.T for part, w in zip(parts, weight, strict=True)])


@torch.library.custom_op("torchtitan_mtp::grouped_outer", mutates_args=())
def _outer(g: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """Sum over each group's rows of g [R, out] times x [R, in]: [G, out, in]."""
    if not len(x):
        return x.new_zeros(len(offsets), g.shape[1], x.shape[1])
    if not _is_native(x.dtype, g.shape[1], x.shape[1]):
        splits = offsets.tolist()[:-1]
        parts = zip(g.tensor_split(splits), x.tensor_split(splits), strict=True)
        return torch.stack([a.T @ b for a, b in parts])
    out = F.grouped_mm(g.T, x, offs=offsets)
    if out.is_cuda and torch.cuda.get_device_capability(out.device)[0] >= 10:
        # On Blackwell it leaves the place of an empty group as it found it.
        sizes = torch.diff(offsets, prepend=offsets.new_zeros(1))
        out.masked_fill_((sizes == 0)[:, None, None], 0)
    return out


@_product.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@_outer.register_fake
def _(g: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0], g.shape[1], x.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, offsets = ctx.saved_tensors
    g = g.contiguous()
    dx = _product(g, weight.transpose(1, 2), offsets) if ctx.needs_input_grad[0] else None
    dw = _outer(g, x, offsets) if ctx.needs_input_grad[1] else None
    return dx, dw, None


_product.register_autograd(_backward, setup_context=_keep)


def _is_native(dtype: torch.dtype, *widths: int) -> bool:
    """Whether torch has a kernel: 16-bit floats and float32, rows of whole 16 bytes."""
    whole = all(width * dtype.itemsize % 16 == 0 for width in widths)
    return hasattr(F, "grouped_mm") and dtype in _NATIVE_DTYPES and whole
