"""torch.compile around the loss, and inside it."""

from __future__ import annotations

import pytest
import torch
from loss_inputs import OPTIONS, gradients, make_inputs

from torchtitan_mtp.ops import LossOptions, chunked, head_loss_and_grad, linear_cross_entropy
from torchtitan_mtp.ops.token_losses import traceable_token_losses


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torch_compile_around_it(backend):
    hiddens, weight, labels = make_inputs(n=2, dtype=torch.float32)

    def step(h0, h1, w, y):
        return linear_cross_entropy([h0 * 2, h1], w, y, chunk_rows=8, z_loss=1e-3)

    expected = step(*hiddens, weight, labels)
    exact = gradients(expected.loss, hiddens, weight)
    got = torch.compile(step, backend=backend, fullgraph=True)(*hiddens, weight, labels)
    torch.testing.assert_close(tuple(got), tuple(expected))
    torch.testing.assert_close(gradients(got.loss, hiddens, weight), exact)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_form_for_compilers_is_the_same_loss(monkeypatch, dtype, options):
    """Uncompiled, for all options; bfloat16 as on a device that multiplies it."""
    monkeypatch.setattr(chunked, "compiled_token_losses", lambda: traceable_token_losses)
    mm = torch.bfloat16 if dtype == torch.bfloat16 else None
    (hidden,), weight, labels = make_inputs(n=1, dtype=dtype)
    weights = torch.rand(len(labels), dtype=torch.float64)
    results = []
    for compiled in (False, True):
        d_weight = torch.zeros(weight.shape, dtype=torch.promote_types(dtype, torch.float32))
        losses, d_hidden = head_loss_and_grad(
            hidden,
            weight,
            labels[:, 0],
            torch.tensor(0.3, dtype=d_weight.dtype),
            LossOptions(**options, chunk_rows=8, compile=compiled),
            row_weights=weights,
            d_weight=d_weight,
            mm=mm,
        )
        results.append([*losses, d_hidden, d_weight])
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if dtype == torch.bfloat16 else {}
    for found, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("n_rows", [16, 37])
def test_compiled_passes(n_rows):
    hiddens, weight, labels = make_inputs(n=2, n_rows=n_rows, dtype=torch.float32)
    options = {"chunk_rows": 8, "z_loss": 1e-3, "softcap": 5.0}
    expected = linear_cross_entropy(hiddens, weight, labels, **options)
    got = linear_cross_entropy(hiddens, weight, labels, compile=True, **options)
    torch.testing.assert_close(tuple(got), tuple(expected))
    exact = gradients(expected.loss, hiddens, weight)
    torch.testing.assert_close(gradients(got.loss, hiddens, weight), exact)
    inside = torch.compile(
        lambda *heads: linear_cross_entropy(heads, weight, labels, compile=True, **options).loss,
        fullgraph=True,
        backend="aot_eager",
    )(*hiddens)
    torch.testing.assert_close(inside, expected.loss)
