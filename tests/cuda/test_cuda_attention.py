"""Attention and grouped products on a GPU against float64 on the CPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from on_device import assert_near, in_every_suite
from test_grouped_linear import OFFSETS, gradients, naive
from torch import Tensor
from torch.nn.attention import restore_flash_attention_impl
from torch.nn.attention.flex_attention import BlockMask

from torchtitan_mtp.data.targets import Documents, Window, make_batch
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.attention import attend
from torchtitan_mtp.models.packed import activate_flash_attention, packed_mask
from torchtitan_mtp.ops import grouped_linear as module
from torchtitan_mtp.ops.grouped_linear import grouped_linear

SHAPES = {  # heads of queries, of keys and values; width of queries and keys, of values
    "alike": (2, 2, 64, 64),
    "grouped": (4, 2, 128, 128),
    "latent": (2, 2, 192, 128),
}
FORMS: dict[str, Any] = {"causal": type(None), "flex": BlockMask, "varlen": Documents}


def document(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k / sqrt(d)) v, [H, S, e], where a query sees what is not behind it."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1) @ v


def one_by_one(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Every document of every row alone: [B, H, S, e]."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    rows = []
    for row, *tensors in zip(ids.tolist(), q, k, v, strict=True):
        sizes = [len(list(same)) for _, same in itertools.groupby(row)]
        parts = zip(*(x.split(sizes, 1) for x in tensors), strict=True)
        rows.append(torch.cat([document(*part) for part in parts], 1))
    return torch.stack(rows)


def check_attention(shape: str, form: str, dtype: torch.dtype, device: str) -> None:
    """Outputs and gradients of two rows of documents of many lengths, the last one's end padded."""
    heads, kv_heads, width, value_width = SHAPES[shape]
    tokens = torch.zeros(2, 301, dtype=torch.int64)
    ids = (torch.rand(2, 301) < 0.01).cumsum(1) if form != "causal" else tokens.clone()
    if form != "causal":
        ids[1, -40:] = -1
    batch = make_batch(Window(tokens, ids), 1).to(torch.device(device))
    mask = None
    if form != "causal":
        mask = packed_mask(batch, (width, value_width), dtype, form)
    if device == "cuda":
        assert isinstance(mask, FORMS[form])
    sizes = [(heads, width), (kv_heads, width), (kv_heads, value_width), (heads, value_width)]
    q, k, v, g = (torch.randn(2, h, 300, d).to(dtype) for h, d in sizes)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected = one_by_one(*exact, ids[:, :300])
    leaves = [x.to(device).requires_grad_() for x in (q, k, v)]
    found = attend(*leaves, mask)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-5
    assert_near(found, expected, tolerance)
    right = torch.autograd.grad(expected, exact, g.double())
    for gradient, of in zip(torch.autograd.grad(found, leaves, g.to(device)), right, strict=True):
        assert_near(gradient, of, tolerance)


@in_every_suite
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("causal", torch.float32),
        ("causal", torch.bfloat16),
        ("flex", torch.float32),
        ("flex", torch.bfloat16),
        ("varlen", torch.bfloat16),
    ],
)
def test_attention(shape, form, dtype, device):
    check_attention(shape, form, dtype, device)


@pytest.mark.cuda
@pytest.mark.parametrize("impl", ["FA3", "FA4"])
def test_other_flash_attention(impl):
    try:
        activate_flash_attention(impl)
    except UserError as error:
        pytest.skip(str(error))  # it names the package, or the card that it is for
    try:
        for shape in ("alike", "grouped"):
            check_attention(shape, "varlen", torch.bfloat16, "cuda")
    finally:
        restore_flash_attention_impl()


@in_every_suite
@pytest.mark.parametrize("path", ["native", "loop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products(dtype, path, device, monkeypatch):
    monkeypatch.setattr(module, "_is_native", lambda *_: path == "native")
    for rows in OFFSETS.values():
        x, weight, g = (torch.randn(*s, dtype=dtype) for s in ((12, 16), (4, 24, 16), (12, 24)))
        tensors = (x.to(device), weight.to(device))
        offsets = torch.tensor(rows, dtype=torch.int32, device=device)
        found = gradients(grouped_linear, *tensors, offsets, g.to(device))
        expected = gradients(naive, x.double(), weight.double(), rows, g.double())
        for a, b in zip(found, expected, strict=True):
            assert_near(a, b, 1e-2 if dtype == torch.bfloat16 else 1e-6)
        sizes = torch.diff(offsets, prepend=offsets.new_zeros(1))
        assert found[2][sizes == 0].count_nonzero() == 0
