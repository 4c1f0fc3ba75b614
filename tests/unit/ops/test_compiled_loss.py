"""torch.compile around the loss, and inside it."""

from __future__ import annotations

import pytest
import torch
from loss_inputs import OPTIONS, gradients, make_inputs

from tests.naive_loss import naive_loss
from torchtitan_mtp.ops import LossOptions, head_loss_and_grad, linear_cross_entropy, token_losses
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
    monkeypatch.setattr(token_losses, "compiled_token_losses", lambda _: traceable_token_losses)
    mm = torch.bfloat16 if dtype == torch.bfloat16 else None
    (hidden,), weight, labels = make_inputs(n=1, dtype=dtype)
    weights = torch.rand(len(labels), dtype=torch.float64)
    results = []
    for passes in ("eager", "compiled"):
        d_weight = torch.zeros(weight.shape, dtype=torch.promote_types(dtype, torch.float32))
        losses, d_hidden = head_loss_and_grad(
            hidden,
            weight,
            labels[:, 0],
            torch.tensor(0.3, dtype=d_weight.dtype),
            LossOptions(**options, chunk_rows=8, passes=passes),
            row_weights=weights,
            d_weight=d_weight,
            mm=mm,
        )
        results.append([*losses, d_hidden, d_weight])
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if dtype == torch.bfloat16 else {}
    for found, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("spread", [1, 2])
def test_logits_in_bfloat16_against_float64(monkeypatch, spread):
    """Logits of this standard deviation, products in bfloat16, a scale that bfloat16 rounds."""
    monkeypatch.setattr(token_losses, "compiled_token_losses", lambda _: traceable_token_losses)
    (hidden,), weight, labels = make_inputs(1, 256, 16, 5001, dtype=torch.bfloat16)
    weight = (weight.detach() * spread / 4).requires_grad_()
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    scale = torch.tensor(1 / 5000)
    expected = naive_loss(exact[:1], exact[1], labels, scale[None].double())
    d_weight = torch.zeros(weight.shape)
    options = LossOptions(passes="compiled", bf16_logits=True)
    tensors = (hidden, weight, labels[:, 0], scale, options)
    losses, d_hidden = head_loss_and_grad(*tensors, d_weight=d_weight, mm=torch.bfloat16)
    torch.testing.assert_close(losses.loss_sum.double(), expected.loss_sum[0], rtol=1e-4, atol=0)
    assert losses.valid == expected.valid[0]
    for found, right in zip(
        (d_hidden, d_weight), torch.autograd.grad(expected.loss, exact), strict=True
    ):
        assert (found.double() - right).norm() <= 3e-3 * right.norm()


def test_a_loss_without_gradients_is_not_compiled_or_rounded(monkeypatch):
    monkeypatch.setattr(token_losses, "compiled_token_losses", None)
    (hidden,), weight, labels = make_inputs(n=1, dtype=torch.float32)
    plain = LossOptions(z_loss=1e-2)
    rounded = plain._replace(passes="compiled", bf16_logits=True)
    expected, got = (
        head_loss_and_grad(hidden, weight, labels[:, 0], None, options, need_d_hidden=False)
        for options in (plain, rounded)
    )
    assert got == expected and got[1] is None


@pytest.mark.parametrize("n_rows", [16, 37])
def test_compiled_passes(n_rows):
    hiddens, weight, labels = make_inputs(n=2, n_rows=n_rows, dtype=torch.float32)
    options = {"chunk_rows": 8, "z_loss": 1e-3, "softcap": 5.0}
    expected = linear_cross_entropy(hiddens, weight, labels, **options)
    got = linear_cross_entropy(hiddens, weight, labels, passes="compiled", **options)
    torch.testing.assert_close(tuple(got), tuple(expected))
    exact = gradients(expected.loss, hiddens, weight)
    torch.testing.assert_close(gradients(got.loss, hiddens, weight), exact)
    inside = torch.compile(
        lambda *heads: (
            linear_cross_entropy(heads, weight, labels, passes="compiled", **options).loss
        ),
        fullgraph=True,
        backend="aot_eager",
    )(*hiddens)
    torch.testing.assert_close(inside, expected.loss)


def test_passes_are_compiled_by_the_backend_that_is_named():
    seen = []

    def noted(graph, _):
        seen.append(graph)
        return graph.forward

    torch._dynamo.register_backend(noted, name="noted")
    hiddens, weight, labels = make_inputs(n=1, dtype=torch.float32)
    expected = linear_cross_entropy(hiddens, weight, labels)
    for _ in range(2):
        got = linear_cross_entropy(
            hiddens, weight, labels, passes="compiled", compile_backend="noted"
        )
        torch.testing.assert_close(tuple(got), tuple(expected))
        assert len(seen) == 1
