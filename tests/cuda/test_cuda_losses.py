"""The loss on a GPU against whole logits in float64 on the CPU: eager, compiled, and by Triton."""

from __future__ import annotations

import functools

import pytest
import torch
from loss_inputs import IGNORE, make_inputs
from on_device import CPU, CPU_AT_LENGTH, GPU, assert_near, at_length, in_every_suite, on
from torch import Tensor
from triton_cases import NOT_FINITE, Case, cases, check, run

from tests.naive_loss import naive_loss
from torchtitan_mtp.ops import LossOptions, LossOutput, linear_cross_entropy

FINITE = [case for case in cases() if case.filled is None]
UNROUNDED = [case for case in FINITE if not case.dtypes[2]]  # eager passes have float32 logits
LARGE = 128256


@pytest.mark.cuda
def test_triton_over_shapes_dtypes_and_options():
    """The table that Triton's interpreter is held to: vocabularies of 1 to 128,256."""
    for case in FINITE:
        check(case, run(case, "triton", "cuda"))


@in_every_suite
def test_eager_over_shapes_dtypes_and_options(device):
    for case in UNROUNDED if device == "cuda" else UNROUNDED[::9]:
        check(case, run(case, "eager", device))


@at_length
@pytest.mark.parametrize("case", UNROUNDED[4::9], ids=str)
def test_compiled_for_some_of_them(case, device):
    check(case, run(case, "compiled", device))


@pytest.mark.cuda
@pytest.mark.parametrize("value", NOT_FINITE)
def test_not_finite_logits(value):
    case = Case(filled=value)
    expected = run(case, "eager", "cpu")
    for passes in ("eager", "triton"):
        found = [t.cpu() for t in run(case, passes, "cuda")]
        torch.testing.assert_close(found, expected, equal_nan=True)


ALL = {"z_loss": 1e-3, "softcap": 20.0, "label_smoothing": 0.1, "target_weight": 0.6}


@functools.cache
def two_heads(vocab: int, target_loss: str) -> tuple[list[Tensor], Tensor, dict, LossOutput, tuple]:
    """bfloat16 inputs of two heads, of which the second learns from the first; and in float64 what
    is right. Rows without a label, row weights, logits of a standard deviation of 1.6."""
    hiddens, weight, labels = make_inputs(2, 100, 64, vocab, torch.bfloat16)
    weight = (weight.detach() * 0.2).requires_grad_()
    labels[-1, 1] = IGNORE  # there is nothing to learn from behind it
    rest = {
        "labels": labels,
        "head_scales": torch.tensor([1 / 70, 0.5 / 70]),
        "row_weights": torch.rand(100, 2),
        "teacher": hiddens[0].detach(),
    }
    exact = [t.detach().double().requires_grad_() for t in (*hiddens, weight)]
    doubles = {k: v.double() if v.is_floating_point() else v for k, v in rest.items()}
    out = naive_loss(exact[:2], exact[2], **doubles, target_loss=target_loss, **ALL)
    return hiddens, weight, rest, out, torch.autograd.grad(out.loss, exact)


@pytest.mark.parametrize(
    ("device", "passes", "rounded", "target_loss"),
    [
        *[
            pytest.param("cuda", *way, loss, marks=GPU.marks)
            for way in (("eager", False), ("triton", False), ("triton", True))
            for loss in ("kl", "lk", "tv")
        ],
        pytest.param("cuda", "compiled", False, "kl", marks=GPU.marks),
        pytest.param("cuda", "compiled", True, "lk", marks=GPU.marks),
        pytest.param("cpu", "eager", False, "kl", marks=CPU.marks),
        pytest.param("cpu", "compiled", False, "lk", marks=CPU_AT_LENGTH.marks),
    ],
)
def test_every_option_at_once(device, passes, rounded, target_loss):
    vocab = LARGE if device == "cuda" else 1003
    hiddens, weight, rest, exact, gradients = two_heads(vocab, target_loss)
    leaves = [t.detach().to(device).requires_grad_() for t in (*hiddens, weight)]
    options = LossOptions(target_loss=target_loss, passes=passes, bf16_logits=rounded, **ALL)
    out = linear_cross_entropy(leaves[:2], leaves[2], options=options, **on(device, rest))
    torch.testing.assert_close(out.loss_sum.cpu().double(), exact.loss_sum, rtol=1e-3, atol=0)
    assert torch.equal(out.valid.cpu(), exact.valid)
    for found, right in zip(torch.autograd.grad(out.loss, leaves), gradients, strict=True):
        assert_near(found, right, 1e-2)  # some CPUs round logits to bfloat16 too
