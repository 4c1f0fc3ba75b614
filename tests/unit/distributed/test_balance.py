"""Experts' biases after a step, what they do to the loads, and what counts as a step's tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.small import DEEPSEEK, small_model, small_window
from torchtitan_mtp.config import MTP, ActivationCheckpoint
from torchtitan_mtp.data.targets import make_batch
from torchtitan_mtp.distributed.activation_checkpoint import apply_activation_checkpointing
from torchtitan_mtp.distributed.balance import ExpertLoads, balance_experts, weigh_balance_losses
from torchtitan_mtp.mtp import ENGINES
from torchtitan_mtp.ops import LossOptions

N = 3


def model_of(heads: str = "sequential", coeff: float = 0.01, **mtp):
    shape = replace(DEEPSEEK, moe=replace(DEEPSEEK.moe, load_balance_coeff=coeff))
    return small_model(MTP(heads=heads, num_future_tokens=N, **mtp), shape=shape)


def test_a_bias_moves_by_the_sign_of_what_is_missing():
    model = model_of()
    moe = model.layers["1"].moe
    moe.expert_bias.zero_()
    moe.tokens_per_expert.copy_(torch.tensor([8, 1, 4, 4, 4, 4, 4, 3]))  # 4 on average
    balance_experts(model)
    # -, +, six more: +1 once for two experts and -1 for one leaves a mean of 1 / 8.
    signs = torch.tensor([-1.0, 1, 0, 0, 0, 0, 0, 1])
    torch.testing.assert_close(moe.expert_bias, 0.01 * (signs - 1 / 8))
    assert moe.tokens_per_expert.sum() == 0
    other = model.layers["2"].moe.expert_bias.clone()  # it had no tokens
    balance_experts(model)
    assert torch.equal(model.layers["2"].moe.expert_bias, other)


def test_metrics_by_hand():
    counts = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [8, 8, 0, 0], [0, 0, 0, 0]])
    found = ExpertLoads(["a", "b", "c", "d"], counts).send()()
    assert [found[f"moe/{name}/load_max_over_mean"] for name in "abcd"] == [1, 4, 2, 0]
    entropies = [found[f"moe/{name}/load_entropy"] for name in "abcd"]
    assert entropies == pytest.approx([1, 0, math.log(2) / math.log(4), 0])
    assert len(found) == 8


def test_a_dense_model_has_nothing_to_balance():
    assert balance_experts(small_model(MTP(num_future_tokens=2))) is None


def imbalance(model, steps: int) -> list[float]:
    """max / mean of every mixture over the first and the last tenth of the steps, averaged, from a
    start that prefers some experts."""
    values = []
    for _, moe in model.named_moe_layers():
        moe.expert_bias.copy_(torch.linspace(0, 0.8, 8))
    for i in range(steps):
        model(make_batch(small_window(8, 48 + N, seed=i), N))
        found = balance_experts(model).send()()
        values.append([v for tag, v in found.items() if tag.endswith("max_over_mean")])
    loads = torch.tensor(values)  # [steps, mixtures]
    return [part.mean().item() for part in (loads[: steps // 10], loads[-steps // 10 :])]


def test_imbalance_falls_with_biases_that_move_and_not_without():
    before, after = imbalance(model_of(coeff=0.04), 50)
    assert before > 1.8 and after < 1.4, (before, after)
    before, after = imbalance(model_of(coeff=0.0), 20)
    assert before > 1.8 and after > 1.8, (before, after)


@pytest.mark.parametrize(
    ("heads", "engine"),
    [("parallel", "head_by_head"), ("parallel", "joint"), ("sequential", "head_by_head")],
)
@pytest.mark.parametrize(
    "config",
    [{"mode": "full"}, {"mode": "selective"}, {"mode": "selective", "selective_ac_option": "op"}],
    ids=["full", "every second", "op"],
)
def test_recomputed_activations_are_not_counted_again(heads, engine, config):
    batch, counts = make_batch(small_window(2, 12 + N), N), []
    for ac in ({"mode": "none"}, config):
        model = model_of(heads)
        apply_activation_checkpointing(model, ActivationCheckpoint(**ac))
        for _ in range(2):  # micro-batches add up
            ENGINES[engine](model, batch, torch.ones(N), LossOptions(), True)
        counts.append(balance_experts(model).counts)
    tokens = batch.tokens.numel() * DEEPSEEK.moe.top_k
    assert counts[0].sum(1).tolist() == [2 * tokens] * 4  # two layers, two heads
    assert torch.equal(*counts)


def test_a_shared_module_counts_every_use():
    model = model_of(share_weights=True)
    batch = make_batch(small_window(2, 12 + N), N)
    model(batch)
    loads = balance_experts(model)
    tokens = batch.tokens.numel() * DEEPSEEK.moe.top_k
    assert loads.names == ["layers.1", "layers.2", "mtp.heads.0"]
    assert loads.counts.sum(1).tolist() == [tokens, tokens, 2 * tokens]


def test_balance_losses_weigh_as_their_heads_do():
    shape = replace(DEEPSEEK, moe=replace(DEEPSEEK.moe, aux_loss_coeff=0.5))
    for share in (False, True):
        mtp = MTP(heads="sequential", num_future_tokens=N, share_weights=share)
        model = small_model(mtp, shape=shape)
        weigh_balance_losses(model, [1.0, 0.25, 0.75], 8)
        found = {
            name: moe.aux_loss_scale.item() * 8 / 0.5 for name, moe in model.named_moe_layers()
        }
        assert [found["layers.1"], found["layers.2"]] == [1, 1]
        heads = [found[f"mtp.heads.{k}"] for k in range(1 if share else 2)]
        assert heads == ([0.5] if share else [0.25, 0.75])


@pytest.mark.parametrize("heads", ["parallel", "sequential"])
def test_a_frozen_trunks_biases_stay(heads):
    model = model_of(heads, train="heads")
    before = {name: moe.expert_bias.clone() for name, moe in model.named_moe_layers()}
    batch = make_batch(small_window(2, 12 + N), N)
    ENGINES["head_by_head"](model, batch, torch.ones(N), LossOptions(), True)
    balance_experts(model)
    for name, moe in model.named_moe_layers():
        assert torch.equal(moe.expert_bias, before[name]) != name.startswith("mtp."), name
