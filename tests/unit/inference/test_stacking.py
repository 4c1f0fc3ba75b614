"""Several blocks as one."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_model
from torch import nn

from torchtitan_mtp.inference.cache import LayerCache, Positions
from torchtitan_mtp.inference.stacking import first_heads, stack


@pytest.mark.parametrize("qkv_bias", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_stacked_block_is_each_block_on_its_rows(batch: int, qkv_bias: bool) -> None:
    model = random_model("parallel", 4, qkv_bias=qkv_bias)
    blocks = list(model.mtp.heads)
    block = stack(blocks)
    positions = Positions(model, batch, 12)
    rows = positions.repeat(3)
    cache = LayerCache(block, rows)
    apart = [LayerCache(b, positions) for b in blocks]
    for starts, size in (([0] * batch, 4), ([4, 2][:batch], 3), ([7, 5][:batch], 1)):
        x = torch.randn(3 * batch, size, 32, dtype=torch.float64)
        span, wide = positions.span(starts, size), rows.span(starts * 3, size)
        expected = [
            b(part, span.context, c.at(span))
            for b, part, c in zip(blocks, x.chunk(3), apart, strict=True)
        ]
        out = block(x, wide.context, cache.at(wide))
        torch.testing.assert_close(out, torch.cat(expected), rtol=1e-6, atol=1e-6)
    assert torch.allclose(cache.k, torch.cat([c.k for c in apart]), atol=1e-6)
    two = first_heads(block, 2)(
        x[: 2 * batch], positions.repeat(2).span([0] * 2 * batch, 1).context
    )
    alone = [
        b(part, positions.span([0] * batch, 1).context)
        for b, part in zip(blocks[:2], x.chunk(3), strict=False)
    ]
    torch.testing.assert_close(two, torch.cat(alone), rtol=1e-6, atol=1e-6)


def test_stacking_leaves_the_blocks_alone() -> None:
    model = random_model("parallel", 3)
    names = [name for name, _ in model.named_parameters()]
    block = stack(list(model.mtp.heads))
    assert [name for name, _ in model.named_parameters()] == names
    assert isinstance(model.mtp.heads[0].get_submodule("attention.wq"), nn.Linear)
    assert not isinstance(block.get_submodule("attention.wq"), nn.Linear)


def test_weights_of_another_kind_are_refused() -> None:
    with pytest.raises(TypeError, match="Embedding"):
        stack([nn.Sequential(nn.Embedding(3, 2)), nn.Sequential(nn.Embedding(3, 2))])
