"""Routing, experts, counts and the balance loss against their definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.naive import mixture
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.args import MoEArgs
from torchtitan_mtp.models.flavors import model_args
from torchtitan_mtp.models.moe import MoE, sequence_balance_loss

DIM = 16
ARGS = MoEArgs(
    num_experts=8, hidden_dim=8, top_k=3, num_expert_groups=4, num_limited_groups=2, route_scale=1.5
)
SHAPES = {
    "groups": ARGS,
    "one group": replace(ARGS, num_expert_groups=1, num_limited_groups=1),
    "softmax": replace(ARGS, score_func="softmax", route_norm=False, num_shared_experts=2),
    "no shared expert": replace(ARGS, num_shared_experts=0, top_k=1),
}


def make(args: MoEArgs, dtype=torch.float64) -> MoE:
    torch.manual_seed(0)
    moe = MoE(DIM, args).to(dtype)
    for name, parameter in moe.named_parameters():
        torch.nn.init.normal_(parameter, std=2.0 if "gate" in name else 0.3)
    torch.nn.init.normal_(moe.expert_bias, std=0.2)
    return moe


def gradients(out, moe, x):
    out.square().sum().backward()
    found = {name: p.grad for name, p in moe.named_parameters()} | {"x": x.grad}
    return {name: torch.zeros(1) if g is None else g for name, g in found.items()}


def naive_gradients(moe, x):
    p = {n: t.detach().clone().requires_grad_() for n, t in moe.named_parameters()}
    x = x.detach().clone().requires_grad_()
    bias = {"expert_bias": moe.expert_bias}
    out = torch.stack([mixture(p | bias, "", row, moe.args) for row in x])
    out.square().sum().backward()
    found = {name: t.grad for name, t in p.items()} | {"x": x.grad}
    return out, {name: torch.zeros(1) if g is None else g for name, g in found.items()}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # the loop, torch's kernel
def test_output_and_gradients_are_the_naive_ones(name, dtype):
    moe = make(SHAPES[name], dtype)
    x = torch.randn(2, 9, DIM, dtype=dtype, requires_grad=True)
    out = moe(x)
    expected, by_name = naive_gradients(moe, x)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    for key, gradient in gradients(out, moe, x).items():
        torch.testing.assert_close(
            gradient, by_name[key], rtol=tolerance, atol=tolerance, msg=lambda m, k=key: k + m
        )


def test_all_tokens_to_the_same_experts():
    """The others have no token and a gradient of zero; a single token goes alone."""
    moe = make(SHAPES["one group"], torch.float32)
    moe.expert_bias.copy_(torch.tensor([0, 0, 9, 0, 9, 0, 0, 9]))
    for size in (9, 1):
        x = torch.randn(2, size, DIM, requires_grad=True)
        moe.zero_grad()
        moe.tokens_per_expert.zero_()
        found = gradients(moe(x), moe, x)
        _, expected = naive_gradients(moe, x)
        assert moe.tokens_per_expert.tolist() == [0, 0, 2 * size, 0, 2 * size, 0, 0, 2 * size]
        for key, gradient in found.items():
            torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=3e-5)
        assert found["experts.w1"][[0, 1, 3, 5, 6]].count_nonzero() == 0
        assert all(gradient.isfinite().all() for gradient in found.values())


def test_an_expert_with_one_token_of_many():
    moe = make(replace(SHAPES["one group"], num_shared_experts=0, top_k=1))
    with torch.no_grad():
        moe.expert_bias.zero_()
        moe.router.gate.weight.zero_()[:, 0] = torch.tensor([1.0, -1, 0, 0, 0, 0, 0, 0])
    x = torch.randn(1, 20, DIM, dtype=torch.float64)
    x[..., 0] = x[..., 0].abs() + 0.1
    x[0, 7, 0] = -1.0
    x.requires_grad_()
    found = gradients(moe(x), moe, x)
    assert moe.tokens_per_expert.tolist() == [19, 1, 0, 0, 0, 0, 0, 0]
    _, expected = naive_gradients(moe, x)
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-9, atol=1e-9)
    assert found["experts.w2"][1].count_nonzero() > 0


def test_the_bias_moves_the_choice_and_nothing_else():
    moe = make(SHAPES["one group"])
    x = torch.randn(30, DIM, dtype=torch.float64)
    scores, chosen, weights = moe.router(x, moe.expert_bias)
    assert not moe.expert_bias.requires_grad
    again, same, rescaled = moe.router(x, moe.expert_bias + 5.0)  # the same for all
    assert torch.equal(chosen, same) and torch.equal(weights, rescaled)
    bias = torch.full((8,), -5.0).index_fill(0, torch.tensor([1, 2, 6]), 5.0)
    _, forced, weights = moe.router(x, bias)
    assert sorted(forced[0].tolist()) == [1, 2, 6] and torch.equal(again, scores)
    expected = scores.gather(-1, forced)
    expected = 1.5 * expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(weights, expected)


def test_tokens_are_counted_in_training_alone_and_added_up():
    moe = make(ARGS)
    x = torch.randn(2, 9, DIM, dtype=torch.float64)
    with torch.no_grad():
        moe(x)
    assert moe.tokens_per_expert.sum() == 0
    moe(x)
    once = moe.tokens_per_expert.clone()
    _, chosen, _ = moe.router(x.flatten(0, 1), moe.expert_bias)
    assert once.tolist() == [(chosen == e).sum().item() for e in range(8)]
    moe(x)
    assert torch.equal(moe.tokens_per_expert, 2 * once)
    assert list(moe.state_dict()).count("expert_bias") == 1
    assert "tokens_per_expert" not in moe.state_dict()


def test_the_balance_loss_is_the_papers():
    scores, top_k = torch.rand(3, 10, 8, dtype=torch.float64), 2
    chosen = scores.topk(top_k, dim=-1).indices
    expected = 0.0
    for b in range(3):  # equations 17 to 20, an expert at a time
        for e in range(8):
            f = 8 / (top_k * 10) * sum(e in chosen[b, t] for t in range(10))
            expected += f * sum(scores[b, t, e] / scores[b, t].sum() for t in range(10)) / 10
    assert abs(sequence_balance_loss(scores, chosen).item() - expected.item()) < 1e-12


def test_the_balance_loss_counts_in_gradients_alone():
    moe = make(replace(ARGS, aux_loss_coeff=0.1))
    x = torch.randn(2, 9, DIM, dtype=torch.float64, requires_grad=True)
    plain = moe(x)
    (before,) = torch.autograd.grad(plain.square().sum(), moe.router.gate.weight)
    moe.aux_loss_scale.fill_(0.25)
    out = moe(x)
    assert torch.equal(out, plain)
    (after,) = torch.autograd.grad(out.square().sum(), moe.router.gate.weight)
    scores, chosen, _ = moe.router(x.flatten(0, 1), moe.expert_bias)
    loss = sequence_balance_loss(scores.view(2, 9, 8), chosen.view(2, 9, 3))
    (of_loss,) = torch.autograd.grad(loss, moe.router.gate.weight)
    torch.testing.assert_close(after - before, 0.25 * of_loss, rtol=1e-9, atol=1e-12)
    assert of_loss.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_expert_groups": 3}, "expected a divisor of num_experts = 8"),
        ({"num_expert_groups": 2, "num_limited_groups": 4}, "at least num_limited_groups = 4"),
        ({"num_expert_groups": 8, "num_limited_groups": 4}, "groups of one expert"),
        ({"num_expert_groups": 4, "top_k": 3}, r"top_k = 3: expected at most 2"),
    ],
)
def test_experts_that_do_not_fit(changes, message):
    with pytest.raises(UserError, match=message):
        model_args("deepseek_v3", "custom", tokenizer_vocab=9, changes={"moe": changes})
