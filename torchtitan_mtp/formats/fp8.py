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


def without_quantization(tensors: Tensors) -> Tensors:
    """The tensors, of which those in FP8 look as if they were in bfloat16 and are read in float32,
    which their products with the scales are exact in; the scales are not to be seen.

    Raises:
        UserError: a weight without its scales, or with scales of another shape.
    """
    kinds = dict(tensors.kinds)
    quantized = {name for name, kind in kinds.items() if kind.dtype == _FP8}
    if not quantized:
        return tensors
    block = _block_of(tensors)
    for name in quantized:
        shape, scale = tensors.kinds[name].shape, kinds.pop(name + _SCALE, None)
        if len(shape) != 2:
            raise UserError(f"{tensors.where}: {name} {tuple(shape)} is in FP8, expected a matrix")
        expected = tuple(-(-size // b) for size, b in zip(shape, block, strict=True))
        if scale is None or scale.shape != expected:
            found = "missing" if scale is None else f"of shape {tuple(scale.shape)}"
            raise UserError(
                f"{tensors.where}: {name} {tuple(shape)} is in FP8 with {name}{_SCALE} {found}, "
                f"expected {expected}, one for each block of {block}"
            )
        kinds[name] = Kind(shape, torch.bfloat16)

    def read(name: str) -> Tensor:
        weight = tensors.read(name)
        if name not in quantized:
            return weight
        scale = tensors.read(name + _SCALE).float()
        rows, columns = (min(b, n) for b, n in zip(block, weight.shape, strict=True))
        scale = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        return weight.float() * scale[: weight.shape[0], : weight.shape[1]]

    return Tensors(tensors.where, kinds, read)


def _block_of(tensors: Tensors) -> tuple[int, int]:
    """Rows and columns of a block: config.json says it, or DeepSeek's."""
    file = tensors.where / "config.json"
    config = Reader(file, read_json(file) if file.is_file() else {})
    block = config.mapping("quantization_config").get("weight_block_size", [128, 128])
    sides = block if isinstance(block, list) else []
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise config.unfit("weight_block_size", block, "two integers above 0")
    return sides[0], sides[1]
