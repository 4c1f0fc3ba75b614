"""On a GPU: the host is not made to wait in a step, and the memory of a step is flat in n."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from benchmarks.heads import memory_table, prepare
from on_device import at_length

from runs import DEEPSEEK, HEAD_BY_HEAD, JOINT, SEQUENTIAL, config_of, finish
from torchtitan_mtp.trainer import Trainer

BF16 = {"training.mixed_precision_param": "bfloat16"}
OP = {"activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "op"}
RUNS = {
    "head_by_head": {**HEAD_BY_HEAD, **BF16, **OP},
    "joint": {**JOINT, "training.global_batch_size": 4},  # in two micro-batches
    "chain": {**SEQUENTIAL, "model.attn_mask_type": "block_causal"},
    "experts": {**DEEPSEEK, **BF16},
    "medusa": {"mtp.heads": "medusa"},
    "distilled": {"mtp.target": "trunk", "mtp.train": "heads"},
}
MIXED = {"training.skip_nonfinite": 2, "metrics.log_freq": 100}


@contextlib.contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """A copy for which the host would have to wait is an error."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    yield
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("default")


@at_length
@pytest.mark.parametrize("name", RUNS)
def test_no_copy_of_a_step_blocks(name, device, tmp_path):
    trainer = Trainer(config_of(tmp_path, RUNS[name], MIXED))
    try:
        for _ in range(2):  # the first one logs, and both make what is made once
            trainer.train_step()
        with no_waiting(device):
            trainer.train_step()
        trainer.guard.settle()
        assert trainer.state.step == 3 and not trainer.state.skipped
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        finish(trainer)


SIZES = {"layers": 8, "dim": 1024, "vocab": 32768, "seq_len": 2048}
SIZES |= {"batch_size": 1, "ac": "none", "dtype": "bfloat16"}


def measured(case: str, n: int) -> float:
    """Most MiB of a step above those that were there before."""
    step = prepare(case, n, **SIZES)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@at_length
def test_memory_is_flat_in_n(device):
    """Of parallel heads; without a GPU, as a fake one's tensors have it."""
    parallel = "parallel, head by head"
    if device == "cuda":
        one, *more = [measured("plain" if n == 1 else parallel, n) for n in (1, 2, 4, 8)]
    else:
        rows = memory_table((1, 4, 8), (parallel,), SIZES)
        one, *more = [row["peak MiB"] for row in rows]
    for peak in more:
        assert peak == pytest.approx(one, rel=0.02)
