"""Blocks of one shape run as one: n - 1 heads in the kernel launches of a single block.

Decoding a few tokens is bound by reading weights and by launching kernels, not by arithmetic. The
parallel heads read the same z and differ in nothing but weights, so block h of H takes the h-th
part of a batch of H * B rows, and every matrix product of the H blocks becomes one batched product.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StackedLinear(nn.Module):
    """H linear maps: weight [H, in, out], and bias [H, 1, out] where they have one."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        weight = torch.stack([layer.weight for layer in layers])  # [H, out, in]
        self.register_buffer("weight", weight.transpose(1, 2))
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        self.register_buffer("bias", torch.stack(biases).unsqueeze(1) if biases else None)

    def forward(self, x: Tensor) -> Tensor:
        """x [H * B, S, in] -> [H * B, S, out]."""
        heads, width, _ = self.weight.shape
        rows = x.reshape(heads, -1, width)
        if self.bias is None:
            out = torch.bmm(rows, self.weight)
        else:
            out = torch.baddbmm(self.bias, rows, self.weight)
        return out.view(*x.shape[:-1], -1)


class StackedRMSNorm(nn.Module):
    """H norms: weight [H, 1, D]."""

    weight: Tensor

    def __init__(self, norms: Sequence[nn.RMSNorm]) -> None:
        super().__init__()
        self.eps = norms[0].eps
        self.register_buffer("weight", torch.stack([norm.weight for norm in norms]).unsqueeze(1))

    def forward(self, x: Tensor) -> Tensor:
        """x [H * B, S, D] -> [H * B, S, D]."""
        heads, _, width = self.weight.shape
        x = F.rms_norm(x, (width,), eps=self.eps)
        return (x.reshape(heads, -1, width) * self.weight).view(x.shape)


def stack(modules: Sequence[nn.Module]) -> nn.Module:
    """H modules of one shape as one over H * B rows; the weights are copied. Everything between
    linear maps and norms must treat the rows of a batch alike."""
    first = modules[0]
    if isinstance(first, nn.Linear):
        return StackedLinear(modules)  # type: ignore[arg-type]
    if isinstance(first, nn.RMSNorm):
        return StackedRMSNorm(modules)  # type: ignore[arg-type]
    if next(first.parameters(recurse=False), None) is not None:
        raise TypeError(f"{type(first).__name__} has weights that can't be stacked")
    stacked = copy.copy(first)
    stacked._modules = {
        name: stack([module.get_submodule(name) for module in modules])
        for name, _ in first.named_children()
    }
    return stacked


def first_heads(stacked: nn.Module, count: int) -> nn.Module:
    """The first `count` of the modules that `stack` put together; nothing is copied."""
    first = copy.copy(stacked)
    first._buffers = {k: None if t is None else t[:count] for k, t in stacked._buffers.items()}
    first._modules = {name: first_heads(m, count) for name, m in stacked.named_children()}
    return first
