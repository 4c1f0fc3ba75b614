"""One head a call with one weight-gradient buffer: the same as all heads in one call."""

from __future__ import annotations

import pytest
import torch

from torchtitan_mtp.ops import HeadByHeadLoss, LossOptions, linear_cross_entropy

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
        outs[k] = loss([hiddens[k]], weight, labels[:, k : k + 1], k, last=k == 0)
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
        torch.testing.assert_close(out.loss_sum[0], whole.loss_sum[k])
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
        hidden = hiddens[k].requires_grad_()
        out = loss([hidden], own, labels[:, k : k + 1], k, last=k == HEADS - 1)
        buffers |= {loss.d_weight.data_ptr()} if loss.d_weight is not None else set()
        out.loss.backward()
    assert len(seen) == 1 and buffers == set(seen)


def test_a_frozen_weight_gets_no_buffer():
    hiddens, weight, labels, scales = problem()
    loss = HeadByHeadLoss(scales, LossOptions())
    hidden = hiddens[2].clone().requires_grad_()
    loss([hidden], weight, labels[:, 2:], 2, last=True).loss.backward()
    assert loss.d_weight is None and hidden.grad.count_nonzero() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_all_heads_in_one_call_and_a_gradient_that_is_there_already(dtype):
    """As the second micro-batch finds it: added to, in float32 and float64 in its own storage."""
    hiddens, weight, labels, scales = problem(dtype)
    leaves = [h.clone().requires_grad_() for h in hiddens]
    shared = weight.clone().requires_grad_()
    whole = linear_cross_entropy(leaves, shared, labels, scales, chunk_rows=7)
    whole.loss.backward()
    apart = [h.clone().requires_grad_() for h in hiddens]
    own = weight.clone().requires_grad_()
    own.grad = torch.full_like(own, 0.5)
    before, loss = own.grad.data_ptr(), HeadByHeadLoss(scales, LossOptions(chunk_rows=7))
    out = loss(apart, own, labels)
    assert (loss.d_weight is None) and (own.grad.data_ptr() == before)
    assert torch.equal(own.grad, torch.full_like(own, 0.5)) == (dtype == torch.float16)
    out.loss.backward()
    torch.testing.assert_close(tuple(out), tuple(whole))
    torch.testing.assert_close(own.grad, shared.grad + 0.5)
    for mine, its in zip(apart, leaves, strict=True):
        torch.testing.assert_close(mine.grad, its.grad)


def test_gradients_take_the_place_of_states():
    hiddens, weight, labels, scales = problem()
    leaves = [h.clone().requires_grad_() for h in hiddens]
    linear_cross_entropy(leaves, weight, labels, scales).loss.backward()
    apart = [h.clone().requires_grad_() for h in hiddens]
    states = [h * 1 for h in apart]
    out = HeadByHeadLoss(scales, LossOptions(chunk_rows=7))(states, weight, labels)
    for state, leaf in zip(states, leaves, strict=True):
        torch.testing.assert_close(state.detach(), leaf.grad)
    out.loss.backward()
    for mine, leaf in zip(apart, leaves, strict=True):
        torch.testing.assert_close(mine.grad, leaf.grad)
    with pytest.raises(RuntimeError, match="second backward over one forward"):
        out.loss.backward()


def test_a_state_that_something_needs_is_not_lost_in_silence():
    hiddens, weight, labels, scales = problem()
    leaf = hiddens[0].clone().requires_grad_()
    state = leaf.exp()  # its backward needs its result
    out = HeadByHeadLoss(scales, LossOptions())([state], weight, labels[:, :1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()
