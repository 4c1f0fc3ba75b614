"""Where these tests run: on a GPU with `-m cuda`. Their bodies run on a CPU too, quick ones in
every suite, others with `-m exhaustive`, so that they keep up with what they test."""

from __future__ import annotations

import pytest
from torch import Tensor

GPU = pytest.param("cuda", marks=pytest.mark.cuda)
CPU = pytest.param("cpu")
CPU_AT_LENGTH = pytest.param("cpu", marks=pytest.mark.exhaustive)

in_every_suite = pytest.mark.parametrize("device", [GPU, CPU])
at_length = pytest.mark.parametrize("device", [GPU, CPU_AT_LENGTH])


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """The norm of what differs, over that of what is expected, in float64 on the CPU."""
    difference = (found.detach().cpu().double() - expected.detach().double()).norm()
    assert difference <= tolerance * expected.norm()


def on(device: str, tensors: dict) -> dict:
    """The arguments with their tensors moved."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in tensors.items()}
