"""Weights in FP8 with a scale for each block, as DeepSeek releases them (arXiv 2412.19437, 3.3.2).

    weight[i, j] = fp8[i, j] * scale_inv[i // b, j // b],   b = 128

`NAME_scale_inv` lies beside NAME. Of a weight whose sides b does not divide the last blocks are
smaller.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats.configs import Reader
from torchtitan_mtp.formats.read import Kind, Tensors, read_json

_SCALE = "_scale_inv"
_FP8 = torch.float8_e4m3fn


class BlockQuantizedTensors:
    """A checkpoint whose FP8 weights look as if they were in bfloat16 and are read in float32,
    which their products with the scales are exact in; the scales are not to be seen.

    Raises:
        UserError: a weight without its scales, or with scales of another shape.
    """

    def __init__(self, tensors: Tensors) -> None:
        self.where, self._tensors = tensors.where, tensors
        self._block = _block_of(tensors)
        quantized = {name for name, kind in tensors.kinds.items() if kind.dtype == _FP8}
        for name in quantized:
            self._check(name)
        scales = {name + _SCALE for name in quantized}
        self.kinds = {
            name: Kind(kind.shape, torch.bfloat16) if name in quantized else kind
            for name, kind in tensors.kinds.items()
            if name not in scales
        }
        self._quantized = quantized

    def _check(self, name: str) -> None:
        shape, scale = self._tensors.kinds[name].shape, self._tensors.kinds.get(name + _SCALE)
        if len(shape) != 2:
            raise UserError(f"{self.where}: {name} {tuple(shape)} is in FP8, expected a matrix")
        expected = tuple(-(-size // b) for size, b in zip(shape, self._block, strict=True))
        found = None if scale is None else tuple(scale.shape)
        if found != expected:
            raise UserError(
                f"{self.where}: {name} {tuple(shape)} is in FP8 with {name}{_SCALE} of shape "
                f"{found}, expected {expected}, one for each block of {self._block}"
            )

    def read(self, name: str) -> Tensor:
        weight = self._tensors.read(name)
        if name not in self._quantized:
            return weight
        scale = self._tensors.read(name + _SCALE).float()
        rows, columns = (min(b, n) for b, n in zip(self._block, weight.shape, strict=True))
        scale = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        return weight.float() * scale[: weight.shape[0], : weight.shape[1]]


def _block_of(tensors: Tensors) -> tuple[int, int]:
    """Rows and columns of a block: config.json says it, or DeepSeek's."""
    file = tensors.where / "config.json"
    config = Reader(file, read_json(file) if file.is_file() else {})
    block = config.mapping("quantization_config").get("weight_block_size") or [128, 128]
    if not (
        isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)
    ):
        raise config.unfit("weight_block_size", block, "two integers above 0")
    return block[0], block[1]


def without_quantization(tensors: Tensors) -> Tensors:
    """The tensors as they are, or their products with their scales where there are any in FP8."""
    quantized = any(kind.dtype == _FP8 for kind in tensors.kinds.values())
    return BlockQuantizedTensors(tensors) if quantized else tensors
