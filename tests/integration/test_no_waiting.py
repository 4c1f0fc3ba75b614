"""Between log lines a training step asks the device for nothing: each such question would make the
host wait for all that is under way."""

from __future__ import annotations

import traceback

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from runs import HEAD_BY_HEAD, JOINT, SEQUENTIAL, config_of, finish
from torchtitan_mtp.trainer import Trainer

# What reads a tensor's value on the host: `.item()`, `bool(tensor)`, `float(tensor)`; equality of
# tensors. (CPUs alone look for the rows with a target, by `nonzero`.)
READS = ("_local_scalar_dense", "equal", "is_nonzero", "item")
FAMILIES = {
    "joint": JOINT,
    "head_by_head": HEAD_BY_HEAD,
    "chain": SEQUENTIAL,
}


class Reads(TorchDispatchMode):
    """Where values were read."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in READS:
            self.places.append("".join(traceback.format_stack(limit=4)[:-1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("keys", FAMILIES.values(), ids=FAMILIES)
def test_a_step_without_a_log_line_reads_nothing(keys, tmp_path):
    accumulation = {"training.global_batch_size": 4, "optimizer.implementation": "fused"}
    trainer = Trainer(config_of(tmp_path, keys, accumulation, {"metrics.log_freq": 4}))
    try:
        trainer.train_step()  # logged, and what is set up once
        with Reads() as reads:
            trainer.train_step()
            trainer.train_step()
        assert not reads.places, reads.places[0]
        with Reads() as logged:
            trainer.train_step()
        assert logged.places  # the test sees reads
    finally:
        finish(trainer)
