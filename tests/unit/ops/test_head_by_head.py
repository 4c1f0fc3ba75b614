"""One head a call with one weight-gradient buffer: the same as all heads in one call."""

from __future__ import annotations

import pytest
import torch

from torchtitan_mtp.ops import LossOptions, linear_cross_entropy
from torchtitan_mtp.ops.head_by_head import HeadByHeadLoss

N, D, V, HEADS = 23, 8, 31, 3


def problem(dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    hiddens = torch.randn(HEADS, N, D, generator=generator, dtype=dtype)
    weight = torch.randn(V, D, generator=generator, dtype=dtype)
    labels = torch.randint(0, V, (N, HEADS), generator=generator)
    labels[::4] = -100
    scales = torch.tensor([0.1, 0.0, 0.7])
    return hiddens, weight, labels, scales


def head_by_head(hiddens, weight, labels, scales, options):
    """In the order of an engine: the last head first, head 0 hands over the weight's gradient."""
    loss = HeadByHeadLoss(scales, options)
    outs = {}
    for k in reversed(range(HEADS)):
        outs[k] = loss(hiddens[k], weight, labels[:, k], k, last=k == 0)
        assert (weight.grad is None) or k == 0
        outs[k].loss.backward()
    return [outs[k] for k in range(HEADS)]


@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1, "softcap": 5.0, "label_smoothing": 0.2}])
def test_losses_and_gradients_are_those_of_one_call(options):
    hiddens, weight, labels, scales = problem()
    leaves = [h.clone().requires_grad_() for h in hiddens]
    shared = weight.clone().requires_grad_()
    whole = linear_cross_entropy(leaves, shared, labels, scales, chunk_rows=7, **options)
    whole.loss.backward()
    apart = [h.clone().requires_grad_() for h in hiddens]
    own = weight.clone().requires_grad_()
    outs = head_by_head(apart, own, labels, scales, LossOptions(chunk_rows=7, **options))
    torch.testing.assert_close(sum(out.loss for out in outs), whole.loss)
    for k, out in enumerate(outs):
        torch.testing.assert_close(out.loss_sum, whole.loss_sum[k])
        assert (out.valid, out.correct) == (whole.valid[k], whole.correct[k])
        torch.testing.assert_close(apart[k].grad, leaves[k].grad)
    torch.testing.assert_close(own.grad, shared.grad)


def test_the_weights_gradient_comes_once_in_one_buffer():
    hiddens, weight, labels, scales = problem(torch.float32)
    own = weight.clone().requires_grad_()
    seen = []

    def note(gradient: torch.Tensor | None) -> None:  # autograd passes None where there is none
        if gradient is not None:
            seen.append(gradient.data_ptr())

    own.register_hook(note)
    loss = HeadByHeadLoss(scales, LossOptions())
    buffers = set()
    for k in range(HEADS):
        out = loss(hiddens[k].requires_grad_(), own, labels[:, k], k, last=k == HEADS - 1)
        buffers |= {loss.d_weight.data_ptr()} if loss.d_weight is not None else set()
        out.loss.backward()
    assert len(seen) == 1 and buffers == set(seen)


def test_a_frozen_weight_gets_no_buffer():
    hiddens, weight, labels, scales = problem()
    loss = HeadByHeadLoss(scales, LossOptions())
    hidden = hiddens[2].clone().requires_grad_()
    loss(hidden, weight, labels[:, 2], 2, last=True).loss.backward()
    assert loss.d_weight is None and hidden.grad.count_nonzero() > 0
