"""The spawn helper: results, failures and time-outs of real gloo ranks."""

import os
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
        os._exit(7)
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


def test_notices_a_rank_that_dies_without_a_word() -> None:
    with pytest.raises(RuntimeError, match="rank 0 died with exit code 7"):
        run_ranks(2, die_on_rank_0)


def test_ends_ranks_that_hang() -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\]"):
        run_ranks(2, hang, timeout=6)
    assert time.monotonic() - start < 30
