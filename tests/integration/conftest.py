"""Trainings inside the test process: one thread, and nothing of one test is left for the next."""

import logging
import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCH_FR_BUFFER_SIZE")


@pytest.fixture(autouse=True)
def own_world() -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in LAUNCH if name in os.environ}
    threads, logger = torch.get_num_threads(), logging.getLogger("torchtitan_mtp")
    level, propagate = logger.level, logger.propagate
    torch.set_num_threads(1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in LAUNCH:
        os.environ.pop(name, None)
    os.environ.update(kept)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.compiler.reset()
    logger.setLevel(level)
    logger.propagate = propagate
