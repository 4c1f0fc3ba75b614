"""Grouped products: torch's kernel and the loop give what one product a group gives."""

from __future__ import annotations

import pytest
import torch

from torchtitan_mtp.ops import grouped_linear as module
from torchtitan_mtp.ops.grouped_linear import grouped_linear

OFFSETS = {
    "even": [3, 6, 9, 12],
    "a group of one": [1, 5, 8, 12],
    "empty groups": [0, 4, 4, 12],
    "all in the first": [12, 12, 12, 12],
    "all in the last": [0, 0, 0, 12],
}


def naive(x, weight, offsets):
    """Row by row: the group of a row is the first that offsets behind it."""
    group = [sum(r >= end for end in offsets) for r in range(len(x))]
    return torch.stack([weight[g] @ row for g, row in zip(group, x, strict=True)])


def gradients(function, x, weight, offsets, g):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = function(x, weight, offsets)
    return y, *torch.autograd.grad(y, (x, weight), g)


@pytest.mark.parametrize("name", OFFSETS)
@pytest.mark.parametrize("path", ["native", "loop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_paths_are_the_naive_product(monkeypatch, name, path, dtype):
    monkeypatch.setattr(module, "_is_native", lambda *_: path == "native")
    x, weight, g = (torch.randn(*s, dtype=dtype) for s in ((12, 16), (4, 24, 16), (12, 24)))
    offsets = torch.tensor(OFFSETS[name], dtype=torch.int32)
    found = gradients(grouped_linear, x, weight, offsets, g)
    expected = gradients(naive, x.double(), weight.double(), OFFSETS[name], g.double())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
    empty = [start == end for start, end in zip([0, *OFFSETS[name]], OFFSETS[name], strict=False)]
    assert all(found[2][i].count_nonzero() == 0 for i, none in enumerate(empty) if none)


@pytest.mark.parametrize("width", [16, 6, 5])
def test_widths_and_types_that_torch_has_no_kernel_for(width):
    x, weight = torch.randn(12, width), torch.randn(4, 7, width)
    offsets = torch.tensor(OFFSETS["empty groups"], dtype=torch.int32)
    for dtype in (torch.float32, torch.float64):
        found = grouped_linear(x.to(dtype), weight.to(dtype), offsets)
        torch.testing.assert_close(found, naive(x.to(dtype), weight.to(dtype), offsets.tolist()))


def test_it_is_taken_whole_by_the_compiler():
    x, weight = torch.randn(12, 5, requires_grad=True), torch.randn(4, 8, 5, requires_grad=True)
    compiled = torch.compile(grouped_linear, backend="aot_eager", fullgraph=True)
    for name in ("even", "empty groups"):  # one graph, however the groups fall
        offsets = torch.tensor(OFFSETS[name], dtype=torch.int32)
        with torch._dynamo.config.patch(error_on_recompile=True):
            y = compiled(x, weight, offsets)
            found = torch.autograd.grad(y.square().sum(), (x, weight))
        expected = torch.autograd.grad(naive(x, weight, OFFSETS[name]).square().sum(), (x, weight))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_no_rows_at_all():
    """Of a rank whose experts no token goes to."""
    x, weight = torch.zeros(0, 16), torch.randn(4, 24, 16)
    offsets = torch.zeros(4, dtype=torch.int32)
    y, dx, dw = gradients(grouped_linear, x, weight, offsets, torch.zeros(0, 24))
    assert (y.shape, dx.shape) == ((0, 24), (0, 16)) and torch.equal(dw, torch.zeros(4, 24, 16))
