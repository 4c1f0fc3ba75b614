"""FSDP2's communication beside computation, with the sizes of 8B on a simulated GPU of eight: what
computation waits for, by a clock for every stream."""

from __future__ import annotations

from unittest import mock

import pytest
from benchmarks.measure import in_process
from benchmarks.overlap import Step, simulate
from benchmarks.streams import Rates

RANKS, LINK = 8, 330e9
LAYERS, WIDTH, VOCABULARY = 3, 4096, 128256
BLOCK = 5 * WIDTH**2 // 2 + 3 * WIDTH * 14336 + 2 * WIDTH  # attention, feed-forward, norms
SIZES = {"parallel": BLOCK, "sequential": BLOCK + 2 * WIDTH**2 + 3 * WIDTH, "medusa": WIDTH**2}
PLAIN = (1, "parallel", "joint", "default")
CASES = [  # n, heads, engine, fsdp_reshard_after_forward
    PLAIN,
    (3, "parallel", "head_by_head", "default"),
    (3, "sequential", "head_by_head", "default"),
]
MORE = [
    PLAIN,
    (1, "parallel", "joint", "never"),
    (3, "parallel", "joint", "default"),
    (3, "parallel", "joint", "never"),
    (2, "parallel", "head_by_head", "default"),
    (8, "parallel", "head_by_head", "default"),
    (2, "sequential", "head_by_head", "default"),
    (4, "sequential", "head_by_head", "never"),
    (3, "parallel", "head_by_head", "never"),
    (3, "medusa", "head_by_head", "default"),
    (3, "medusa", "head_by_head", "never"),
]


def simulated(cases) -> list[Step]:
    """A micro-batch of mtp_8b.toml with fewer layers for each case."""
    changes = [
        [
            f"mtp.num_future_tokens={n}",
            f"mtp.heads={heads}",
            f"mtp.engine={engine}",
            "mtp.match_parameters=false",
            f"model.args.n_layers={LAYERS}",
            f"parallelism.fsdp_reshard_after_forward={reshard}",
            "activation_checkpoint.mode=none",
        ]
        for n, heads, engine, reshard in cases
    ]
    return simulate("mtp_8b.toml", changes, RANKS, Rates(LINK))


def with_one_buffer(cases) -> list[Step]:
    with mock.patch("torchtitan_mtp.distributed.parallelize.overlap_reductions"):
        return simulated(cases)


def seconds(size: int) -> float:
    """Of a collective of so many bytes."""
    return size * (RANKS - 1) / RANKS / LINK


def check(cases, steps) -> None:
    """Heads make computation wait no longer than the plain model does, which waits at its ends
    alone: for the embedding at first, and for the gradients of a block and of the embedding at
    last. What is kept after the forward is gathered once, in bfloat16."""
    embedding, plain = VOCABULARY * WIDTH, steps[0].exposed
    ends = seconds(2 * embedding) + seconds(4 * BLOCK) + seconds(4 * embedding)
    assert plain == pytest.approx(ends, rel=0.05)  # beside it are copies
    for case, step in zip(cases, steps, strict=True):
        n, heads, engine, reshard = case
        assert step.exposed < 1.02 * plain, (case, step.waits)
        assert step.within < 1e-4, (case, step.waits)
        blocks = [BLOCK] * LAYERS + [SIZES[heads]] * (n - 1)
        parameters = sum(blocks) + 2 * embedding + WIDTH
        # By default the last block is kept too, and of independent heads every one.
        in_turn = engine == "head_by_head" and heads != "sequential"
        kept = blocks[LAYERS - 1 :] if in_turn else blocks[-1:]
        again = sum(blocks) - sum(kept) if reshard == "default" else 0
        assert step.bytes["all-gather"] == 2 * (parameters + again), case
        assert step.bytes["reduce-scatter"] == 4 * parameters, case


def test_computation_waits_for_the_first_gathers_and_the_last_reductions():
    check(CASES, in_process(simulated, CASES))


@pytest.mark.exhaustive
def test_other_heads_and_what_the_second_buffer_takes():
    steps = in_process(simulated, MORE)
    check(MORE, steps)
    for case, step, before in zip(MORE, steps, in_process(with_one_buffer, MORE), strict=True):
        block = max(BLOCK, SIZES[case[1]])
        assert 0 <= step.peak - before.peak <= 4 * block, case  # its gradient in float32
