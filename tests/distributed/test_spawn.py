"""The spawn helper: results, failures and time-outs of real gloo ranks."""

import os
import re
import resource
import time

import pytest
import torch
import torch.distributed as dist

from spawn import run_ranks


def sum_of_ranks(rank: int, offset: int) -> tuple[int, torch.Tensor, int]:
    total = torch.tensor([float(rank + offset)])
    dist.all_reduce(total)
    return rank, total, torch.get_num_threads()


def raise_on_rank_1(rank: int) -> None:
    if rank == 1:
        raise ValueError("the cause")
    dist.barrier()  # never answered: must not hang, and must not be the error that is shown


def die_on_rank_0(rank: int) -> None:
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.abort()
    dist.barrier()


def hang(rank: int) -> None:
    time.sleep(600)


def test_returns_the_result_of_every_rank() -> None:
    results = run_ranks(3, sum_of_ranks, 10)
    assert [rank for rank, _, _ in results] == [0, 1, 2]
    for _, total, threads in results:
        assert total.tolist() == [33.0]
        assert threads == 1


def test_shows_the_traceback_of_the_rank_that_failed() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 failed:[\s\S]*raise_on_rank_1[\s\S]*the cause"):
        run_ranks(2, raise_on_rank_1)


def test_notices_a_rank_that_dies_and_shows_where_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="rank 0 died with exit code -6"):
        run_ranks(2, die_on_rank_0)
    assert re.search(r"Aborted[\s\S]* in die_on_rank_0", capfd.readouterr().err)


def test_ends_ranks_that_hang() -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\]"):
        run_ranks(2, hang, timeout=3)
    assert time.monotonic() - start < 30
