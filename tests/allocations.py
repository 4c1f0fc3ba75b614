"""Bytes alive on the CPU, counted at every allocation."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch


def most_alive(step: Callable[[], object]) -> int:
    """Most bytes that are alive at a time in a step, above those that are there before it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.profiler.profile(
            profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
        ) as profile:
            step()
    alive = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most
