"""The estimate of a step beside the step: bytes alive and collectives of real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from benchmarks.collectives import Collectives
from benchmarks.step import run_layout
from torch import Tensor
from torch.distributed.tensor import DTensor

from spawn import run_ranks
from tests.allocations import most_alive
from torchtitan_mtp.config import JobConfig, parse_args
from torchtitan_mtp.models.moe import Router
from torchtitan_mtp.trainer import Trainer

LLAMA = """
--model.name llama3 --model.flavor custom --model.vocab_size 2048 --model.args.dim 128
--model.args.n_layers 4 --model.args.n_heads 4 --model.args.n_kv_heads 2 --model.args.hidden_dim 384
"""
DEEPSEEK = """
--model.name deepseek_v3 --model.flavor quickstart --model.vocab_size 2048
--model.args.moe.aux_loss_coeff 1e-4
"""
COMMON = """
--model.hf_assets_path byte --model.converters mtp --mtp.num_future_tokens 3
--training.dataset python_stdlib --training.seq_len 256 --validation.seq_len 256
--training.local_batch_size 2 --training.steps 4 --training.mixed_precision_param float32
--metrics.log_freq 100 --training.seed 0
"""
PARALLEL = LLAMA + COMMON
CHAIN = LLAMA + COMMON + "--mtp.heads sequential --model.attn_mask_type block_causal"
MIXTURE = DEEPSEEK + COMMON + "--mtp.heads sequential"
TWO = " --training.global_batch_size 8"  # micro-batches, on two data ranks
STAGES = " --parallelism.pipeline_parallel_degree 2"  # micro-batches of one sequence
CASES = {  # ranks and options
    "1": (1, PARALLEL + " --activation_checkpoint.mode none"),
    "2": (2, PARALLEL + TWO),
    "2 chain": (2, CHAIN + " --activation_checkpoint.mode full"),
    "2 experts": (2, MIXTURE),
    "2 experts shared": (2, MIXTURE + " --parallelism.expert_parallel_degree 2"),
    "2 tensor": (2, CHAIN + " --parallelism.tensor_parallel_degree 2"),
    "2 stages": (2, CHAIN + STAGES + " --training.global_batch_size 2"),
    "2 stages, four": (2, CHAIN + STAGES + " --training.global_batch_size 4"),
    "4 replicas": (4, PARALLEL + " --parallelism.data_parallel_replicate_degree 2"),
    "4 context": (4, CHAIN + TWO + " --parallelism.context_parallel_degree 2"),
}


def configuration(options: str, folder: str) -> JobConfig:
    return parse_args([*options.split(), "--job.dump_folder", folder])


def even_routing(_: Router, scores: Tensor) -> Tensor:
    """In the place of scores [N, E], what lets experts have as many tokens, in turn: estimated."""
    tokens, experts = (torch.arange(size) for size in scores.shape)
    turn = (experts - tokens.unsqueeze(1)) % len(experts)
    return -turn.to(scores.dtype)


def real_step(rank: int, options: str, folder: str) -> tuple[int, Any, Any]:
    """Bytes alive at the peak of a step, and collectives of another."""
    Router._within_best_groups = even_routing  # type: ignore[method-assign]
    trainer = Trainer(configuration(options, folder))
    for _ in range(2):  # the first one makes the moments
        trainer.train_step()
    with Collectives(trainer.world) as counts:
        trainer.train_step()
    state = [t for s in trainer.optimizer.state.values() for t in s.values()]
    tensors = [*trainer.model.parameters(), *trainer.model.buffers(), *state]
    local = (t._local_tensor if isinstance(t, DTensor) else t for t in tensors)
    held = sum(t.nbytes for t in local)
    return held + most_alive(trainer.train_step), counts.calls, counts.bytes


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.exhaustive] * (c != "2 chain")) for c in CASES]
)
def test_the_estimate_of_a_step_is_the_step(case: str, tmp_path: Any) -> None:
    ranks, options = CASES[case]
    estimate = run_layout(configuration(options, "unused"), ranks, "cpu", None)
    measured = run_ranks(ranks, real_step, options, str(tmp_path))
    for rank, step in (estimate.stages or {0: estimate}).items():
        peak, calls, size = measured[rank]
        print(f"{case}: {step.peak.total() / 2**20:.2f} MiB, measured {peak / 2**20:.2f}")
        assert step.calls == calls
        assert step.bytes == size
        assert step.peak.total() == pytest.approx(peak, rel=0.05)
