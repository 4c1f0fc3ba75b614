"""Of all tests with ranks: the process that compares them to itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from runs import write_corpus


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of a file's trainings, with a corpus and a held-out one."""
    path = tmp_path_factory.mktemp("ranks")
    write_corpus(path, "jsonl")
    write_corpus(path / "held_out", "jsonl", count=9, seed=9)
    return path
