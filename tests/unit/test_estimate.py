"""scripts/estimate.py: a line through few layers and micro-batches is what all of them take."""

from __future__ import annotations

from typing import Any

import pytest
from benchmarks.measure import in_process
from benchmarks.step import Step, count_step, run_step
from benchmarks.streams import Rates

from torchtitan_mtp.config import parse_args

RANKS, LAYERS, MICRO = 4, 7, 4
DEEPSEEK = f"""
--model.name deepseek_v3 --model.flavor quickstart --model.vocab_size 512
--model.args.n_layers {LAYERS} --model.converters mtp --mtp.heads sequential
--mtp.num_future_tokens 2 --training.seq_len 64 --validation.seq_len 64
--training.local_batch_size 1 --training.global_batch_size {RANKS * MICRO}
--activation_checkpoint.mode full --compile.enable false --checkpoint.enable false
"""


def both_ways() -> list[Step]:
    config, rates = parse_args(DEEPSEEK.split()), Rates(link=1e9)
    return [run_step(config, RANKS, rates=rates), count_step(config, RANKS, MICRO, "gpu", rates)]


def test_a_line_through_few_layers_and_micro_batches_is_the_whole_step() -> None:
    line, whole = in_process(both_ways)
    assert line.peak == whole.peak
    assert (line.calls, line.bytes, line.flops) == (whole.calls, whole.bytes, whole.flops)
    assert line.seconds == pytest.approx(whole.seconds, rel=1e-3)
    found: Any = line.waits
    assert found == pytest.approx(whole.waits, rel=1e-2)
