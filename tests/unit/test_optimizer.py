"""Learning rates against TorchTitan's formula, written out; optimizers over what trains."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from torchtitan_mtp.config import LRScheduler, Optimizer
from torchtitan_mtp.optimizer import build_optimizer, build_scheduler, clip_gradients, lr_factor


def torchtitan_factors(config: LRScheduler, steps: int) -> list[float]:
    """TorchTitan v0.2's `build_lr_schedulers`, in its own order and names."""
    warmup_steps = min(config.warmup_steps, steps)
    if config.decay_ratio is not None:
        decay_steps = round(steps * config.decay_ratio)
        if warmup_steps + decay_steps > steps:
            decay_steps = steps - warmup_steps
    else:
        decay_steps = steps - warmup_steps
    stable_steps = steps + 1 - warmup_steps - decay_steps
    factors = []
    for step in range(steps):
        if step < warmup_steps:
            factors.append((step + 1) / warmup_steps)
        elif step < warmup_steps + stable_steps:
            factors.append(1.0)
        else:
            progress = (step + 1 - warmup_steps - stable_steps) / decay_steps
            if config.decay_type == "linear":
                curve = 1 - progress
            elif config.decay_type == "sqrt":
                curve = 1 - math.sqrt(progress)
            else:
                curve = 0.5 * (1.0 + math.cos(math.pi * progress))
            factors.append(config.min_lr_factor + (1 - config.min_lr_factor) * curve)
    return factors


@pytest.mark.parametrize("decay_type", ["linear", "sqrt", "cosine"])
@pytest.mark.parametrize("decay_ratio", [None, 0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("warmup", [0, 1, 5, 20, 200])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_the_schedule_is_torchtitans(decay_type, decay_ratio, warmup, floor):
    config = LRScheduler(warmup, decay_ratio, decay_type, floor)
    steps = 20
    found = [lr_factor(config, steps, step) for step in range(steps)]
    assert found == pytest.approx(torchtitan_factors(config, steps), abs=1e-12)
    assert all(0 < factor <= 1 for factor in found)  # the last step still learns


def test_by_hand():
    """4 steps of warmup, 6 at the peak, 10 down to a tenth."""
    config = LRScheduler(warmup_steps=4, decay_ratio=0.5, min_lr_factor=0.1)
    found = [lr_factor(config, 20, step) for step in range(20)]
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4:11] == [1.0] * 7
    assert found[11:] == pytest.approx([0.1 + 0.9 * (1 - k / 10) for k in range(1, 10)])


@pytest.mark.parametrize("warmup", [10, 200])
def test_a_run_that_is_all_warmup_rises_to_its_end(warmup, caplog):
    config = LRScheduler(warmup_steps=warmup)
    found = [lr_factor(config, 10, step) for step in range(10)]
    assert found == [(step + 1) / 10 for step in range(10)]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    build_scheduler(optimizer, config, 10)
    assert ("exceeds training.steps" in caplog.text) == (warmup > 10)


def test_the_scheduler_sets_the_rate_of_each_step():
    config = LRScheduler(warmup_steps=3, decay_type="cosine")
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    scheduler = build_scheduler(optimizer, config, 8)
    for step in range(8):
        assert scheduler.get_last_lr()[0] == pytest.approx(0.5 * lr_factor(config, 8, step))
        optimizer.step()
        scheduler.step()


def adam_by_hand(w, gradients, config: Optimizer):
    """Kingma and Ba 2015, algorithm 1; AdamW: Loshchilov and Hutter 2019, algorithm 2."""
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, g in enumerate(gradients, 1):
        if config.name == "AdamW":
            w = w * (1 - config.lr * config.weight_decay)
        else:
            g = g + config.weight_decay * w
        m = config.beta1 * m + (1 - config.beta1) * g
        v = config.beta2 * v + (1 - config.beta2) * g * g
        m_hat, v_hat = m / (1 - config.beta1**t), v / (1 - config.beta2**t)
        w = w - config.lr * m_hat / (v_hat.sqrt() + config.eps)
    return w


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_steps_are_the_papers(name, implementation):
    config = Optimizer(name, 0.1, 0.8, 0.9, eps=1e-3, weight_decay=0.2)
    config.implementation = implementation
    weight = torch.randn(7)
    gradients = [torch.randn(7) for _ in range(4)]
    parameter = nn.Parameter(weight.clone())
    optimizer = build_optimizer([parameter], config)
    assert type(optimizer).__name__ == name
    assert bool(optimizer.defaults["fused"]) == (implementation == "fused")
    assert bool(optimizer.defaults["foreach"]) == (implementation == "foreach")
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), adam_by_hand(weight, gradients, config))


def test_frozen_parameters_are_left_out():
    frozen, free = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(3))
    optimizer = build_optimizer([frozen, free], Optimizer())
    assert [p is free for group in optimizer.param_groups for p in group["params"]] == [True]


@pytest.mark.filterwarnings("error")
def test_a_first_step_without_an_update_is_no_mistake():
    """As one without a target is; torch warns of a scheduler's step before the optimizer's."""
    optimizer = build_optimizer([nn.Parameter(torch.ones(1))], Optimizer())
    scheduler = build_scheduler(optimizer, LRScheduler(warmup_steps=2), 4)
    rates = []
    for _ in range(3):
        rates += scheduler.get_last_lr()
        scheduler.step()
    assert rates == pytest.approx([4e-4, 8e-4, 8e-4])


def test_clipping():
    model = nn.Linear(3, 2, bias=False)
    gradient = torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
    model.weight.grad = gradient.clone()
    assert clip_gradients(model, 10.0) == 5.0
    torch.testing.assert_close(model.weight.grad, gradient)
    assert clip_gradients(model, 1.0) == 5.0
    torch.testing.assert_close(model.weight.grad, gradient / 5, rtol=1e-5, atol=0)
    assert clip_gradients(model, torch.inf) == pytest.approx(1.0)
