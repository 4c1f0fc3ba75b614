"""Head weights, schedules and curricula against tables worked out by hand."""

from __future__ import annotations

import pytest
import torch

from torchtitan_mtp.config import MTP
from torchtitan_mtp.mtp.objective import head_scales, head_weights, loss_scale, num_active_heads


@pytest.mark.parametrize(
    ("mtp", "expected"),
    [
        (MTP(num_future_tokens=1), [1]),
        (MTP(num_future_tokens=4), [1, 1, 1, 1]),  # Gloeckle et al.: a plain sum
        (MTP(num_future_tokens=4, loss_scale=0.3, loss_reduction="mean"), [1, 0.1, 0.1, 0.1]),
        (MTP(num_future_tokens=3, loss_scale=0.5, loss_weights=[2, 4]), [1, 1, 2]),
        (
            MTP(num_future_tokens=3, loss_scale=0.5, loss_weights=[2, 4], loss_reduction="mean"),
            [1, 0.5, 1],
        ),
        (MTP(num_future_tokens=3, loss_scale=0.0), [1, 0, 0]),
        (  # FastMTP: 0.6**(k - 1) / (1 + 0.6 + 0.36) for k = 1, 2, 3 (arXiv 2509.18362, section 3)
            MTP(num_future_tokens=4, loss_decay=0.6, loss_reduction="mean"),
            [1, 1 / 1.96, 0.6 / 1.96, 0.36 / 1.96],
        ),
        (
            MTP(num_future_tokens=4, loss_decay=0.6, loss_scale=0.5),
            [1, 1.5 / 1.96, 0.9 / 1.96, 0.54 / 1.96],
        ),
        (MTP(num_future_tokens=2, loss_decay=0.6), [1, 1]),
        (MTP(num_future_tokens=1, loss_decay=0.6), [1]),
    ],
)
def test_weights(mtp, expected):
    assert head_weights(mtp, 1, 10) == pytest.approx(expected)
    assert head_weights(mtp, 10, 10) == pytest.approx(expected)


def test_linear_schedule():
    mtp = MTP(loss_scale=0.9, loss_scale_schedule="linear", loss_scale_final=0.1)
    assert [loss_scale(mtp, s, 5) for s in range(1, 6)] == pytest.approx([0.9, 0.7, 0.5, 0.3, 0.1])
    assert loss_scale(mtp, 1, 1) == 0.9


def test_step_schedule():
    """DeepSeek-V3: 0.3 for the first 67% of the run, then 0.1."""
    mtp = MTP(loss_scale=0.3, loss_scale_schedule="step")
    assert [loss_scale(mtp, s, 100) for s in (1, 67, 68, 100)] == [0.3, 0.3, 0.1, 0.1]
    mtp.loss_scale_boundary = 0.0
    assert loss_scale(mtp, 1, 100) == 0.1
    mtp.loss_scale_boundary = 1.0
    assert loss_scale(mtp, 100, 100) == 0.3


@pytest.mark.parametrize(
    ("n", "fraction", "steps", "forward"),
    [
        (4, 1.0, 8, [1, 1, 2, 2, 3, 3, 4, 4]),
        (4, 0.5, 8, [1, 2, 3, 4, 4, 4, 4, 4]),
        (2, 1.0, 5, [1, 1, 1, 2, 2]),
        (3, 1.0, 7, [1, 1, 1, 2, 2, 3, 3]),
        (4, 1.0, 2, [1, 3]),  # fewer steps than stages
        (4, 0.1, 5, [1, 4, 4, 4, 4]),
        (1, 1.0, 3, [1, 1, 1]),
    ],
)
def test_curricula(n, fraction, steps, forward):

    def active(curriculum):
        mtp = MTP(num_future_tokens=n, curriculum=curriculum, curriculum_fraction=fraction)
        return [num_active_heads(mtp, step, steps) for step in range(1, steps + 1)]

    assert active("forward") == forward
    assert active("reverse") == [n + 1 - heads for heads in forward]
    assert active("none") == [n] * steps


def test_the_mean_is_over_the_heads_that_are_active():
    mtp = MTP(num_future_tokens=4, curriculum="forward", loss_reduction="mean", loss_scale=0.6)
    assert [head_weights(mtp, s, 4) for s in (1, 2, 3, 4)] == [
        [1.0, 0.0, 0.0, 0.0],
        [1.0, 0.6, 0.0, 0.0],
        [1.0, 0.3, 0.3, 0.0],
        pytest.approx([1.0, 0.2, 0.2, 0.2]),
    ]


def test_decaying_weights_average_1_over_the_heads_that_are_active():
    decayed = {"num_future_tokens": 4, "curriculum": "forward", "loss_decay": 0.5}
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 4 / 3, 2 / 3, 0], [1, 12 / 7, 6 / 7, 3 / 7]]
    for step, weights in enumerate(expected, start=1):
        assert head_weights(MTP(**decayed), step, 4) == pytest.approx(weights)
        mean = [1, *(w / max(1, step - 1) for w in weights[1:])]
        assert head_weights(MTP(**decayed, loss_reduction="mean"), step, 4) == pytest.approx(mean)


def test_without_a_decay_weights_are_what_they_were_to_the_bit():
    for n in (2, 4, 8, 1000):
        assert head_weights(MTP(num_future_tokens=n, loss_scale=0.3), 1, 1)[1:] == [0.3] * (n - 1)


def test_scales_divide_by_global_counts():
    scales = head_scales([1.0, 0.5, 2.0], torch.tensor([10, 4, 0]))
    assert scales.dtype == torch.float32
    assert scales.tolist() == pytest.approx([0.1, 0.125, 0.0])  # without targets 0, not 2 / 0
