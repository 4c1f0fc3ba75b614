"""FSDP2, HSDP, context and tensor parallelism and pipelines on gloo ranks, with accumulation and
unequal numbers of targets: the loss and every gradient are those of one process that sees the whole
batch, and so are each expert's tokens and what its bias becomes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.distributed.tensor import DTensor

from spawn import run_ranks
from tests.naive import total_loss
from tests.small import (
    ARGS,
    DEEPSEEK,
    naive_parameters,
    perturb_norms,
    relative_error,
    small_model,
    small_window,
)
from torchtitan_mtp.config import MTP, JobConfig, Parallelism
from torchtitan_mtp.data.targets import IGNORE, Window, make_batch
from torchtitan_mtp.distributed.balance import balance_experts
from torchtitan_mtp.distributed.mesh import Degrees, all_reduce, init_world
from torchtitan_mtp.distributed.parallelize import parallelize
from torchtitan_mtp.distributed.pipeline import Pipeline
from torchtitan_mtp.models.args import ModelArgs
from torchtitan_mtp.models.transformer import build_model
from torchtitan_mtp.mtp import ENGINES, add_heads, head_scales, head_weights
from torchtitan_mtp.ops import LossOptions

ACCUMULATION = 2


def micro_batch(rank: int, index: int, n: int, size: int) -> Window:
    """Of `size` tokens; another number of documents and of padding in each."""
    window = small_window(2, size + n, seed=10 * rank + index)
    window.doc_ids[0, 6 + 2 * rank + index :] = -1
    return window


def length_of(degrees: Degrees) -> int:
    return 10 if degrees.cp == 1 and degrees.tp < 4 else 12  # of two or three pieces twice


def config_of(mtp: MTP, degrees: Degrees, ac: str = "none", schedule: str = "1F1B") -> JobConfig:
    config = JobConfig()
    config.mtp = mtp
    config.training.mixed_precision_param = "float32"
    config.activation_checkpoint.mode = ac
    config.parallelism = Parallelism(
        data_parallel_replicate_degree=degrees.dp_replicate,
        data_parallel_shard_degree=degrees.dp_shard,
        context_parallel_degree=degrees.cp,
        pipeline_parallel_degree=degrees.pp,
        pipeline_parallel_schedule=schedule,
        pipeline_parallel_microbatch_size=2,
        expert_parallel_degree=degrees.ep,
        tensor_parallel_degree=degrees.tp,
    )
    config.training.seq_len, config.training.local_batch_size = length_of(degrees), 2
    return config


def steps_on_rank(rank: int, degrees: Degrees, cases):
    """Every case on the same ranks: starting processes costs more than stepping."""
    return [step_on_rank(rank, degrees, *case) for case in cases]


def step_on_rank(rank: int, degrees: Degrees, mtp: MTP, ac: str, args: ModelArgs, *schedule: str):
    config = config_of(mtp, degrees, ac, *schedule)
    world = init_world(config.parallelism)
    model = add_heads(build_model(args), mtp)
    options, pipeline = loss_options(mtp), None
    if degrees.pp > 1:
        how = (config, world, torch.float32, 0, options)
        pipeline = Pipeline(model, *how, heads_cost=1.0, windows=ACCUMULATION)
        model = pipeline.model
    else:
        model = parallelize(model, config, world, torch.float32, seed=0)
    perturb_norms(model)
    n, taught = mtp.num_future_tokens, mtp.target == "trunk"
    size = length_of(degrees)
    windows = [micro_batch(world.data_rank, i, n, size) for i in range(ACCUMULATION)]
    batches = [make_batch(window, n, taught) for window in windows]
    if (ranks := world.context_parallel) is not None:
        batches = [ranks.shard(batch) for batch in batches]
    valid = torch.stack([(b.labels != IGNORE).sum((0, 1)) for b in batches]).sum(0)
    valid = all_reduce(valid, group=world.batch)
    scales = head_scales(head_weights(mtp, 1, 10), valid)
    for _ in range(2):  # a second step finds whatever state the first one left behind
        model.zero_grad()
        for _, moe in model.named_moe_layers():
            moe.tokens_per_expert.zero_()
        if pipeline is not None:
            outputs = pipeline.step(batches, scales)
        else:
            engine, end = ENGINES[mtp.engine], len(batches) - 1
            outputs = [
                engine(model, batch, scales, options, i == end) for i, batch in enumerate(batches)
            ]
        total = sum((out.loss for out in outputs), torch.zeros(()))
        all_reduce(total, group=world.losses)
    gradients = {}
    for name, param in model.named_parameters():
        gradient = param.grad
        gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return total, gradients, balanced(model, world.stage)


def loss_options(mtp: MTP) -> LossOptions:
    if mtp.target != "trunk":
        return LossOptions()
    return LossOptions(target_loss=mtp.target_loss, target_weight=mtp.target_weight)


def balanced(model, group=None) -> dict:
    """Each expert's tokens and biases after the step, by block."""
    loads = balance_experts(model, group=group)
    assert all(moe.tokens_per_expert.sum() == 0 for _, moe in model.named_moe_layers())
    return {
        name: torch.stack((counts.float(), moe.expert_bias))
        for (name, moe), counts in zip(
            model.named_moe_layers(), loads.counts if loads else (), strict=True
        )
    }


def naive_step(degrees: Degrees, mtp: MTP, args: ModelArgs, *schedule: str):
    model = small_model(mtp, torch.float64, shape=args)
    parameters = naive_parameters(model)
    windows = [
        micro_batch(rank, i, mtp.num_future_tokens, length_of(degrees))
        for rank in range(degrees.dp_replicate * degrees.dp_shard)
        for i in range(ACCUMULATION)
    ]
    tokens = torch.cat([w.tokens for w in windows])
    doc_ids = torch.cat([w.doc_ids for w in windows])
    loss, _ = total_loss(parameters, tokens, doc_ids, args, mtp)
    loss.backward()
    for window in windows:
        model(make_batch(window, mtp.num_future_tokens))
    trained = dict(model.named_parameters())
    return loss.detach(), {name: parameters[name].grad for name in trained}, balanced(model)


def parallel(**keys) -> MTP:
    return MTP(num_future_tokens=3, loss_weights=[0.5, 2.0], **keys)


def sequential(**keys) -> MTP:
    return MTP(heads="sequential", num_future_tokens=3, loss_scale=0.3, **keys)


QWEN2 = replace(ARGS, tied_embeddings=True, qkv_bias=True)
EXPERTS = replace(DEEPSEEK, n_layers=2)  # one dense block, one of experts
FEW_EXPERTS = replace(  # fewer than ranks: each rank has rows of all
    EXPERTS,
    moe=replace(DEEPSEEK.moe, num_experts=2, top_k=1, num_expert_groups=1, num_limited_groups=1),
)
CAUSAL = replace(ARGS, attn_mask_type="causal")
# A vocabulary that ranks can share.
WIDE = {"vocab_size": 30}
WITH_TP = [
    (parallel(), "selective", replace(ARGS, **WIDE)),
    (parallel(engine="joint", target="trunk"), "none", replace(QWEN2, **WIDE)),
    (sequential(), "full", replace(EXPERTS, **WIDE)),
    (
        sequential(target="trunk", target_loss="tv", trunk_state="raw"),
        "none",
        replace(ARGS, **WIDE),
    ),
]
WITH_EP_AND_TP = [
    (parallel(), "none", replace(EXPERTS, **WIDE)),
    (sequential(), "full", replace(EXPERTS, **WIDE)),
]
WITH_CP = [
    (parallel(), "selective", CAUSAL),
    (parallel(engine="joint", target="trunk"), "none", QWEN2),
    (sequential(), "full", EXPERTS),
    (sequential(target="trunk"), "none", ARGS),
]
WITH_EP = [
    (parallel(), "selective", EXPERTS),
    (parallel(engine="joint"), "none", EXPERTS),
    (sequential(), "full", EXPERTS),
]
FOUR = replace(ARGS, n_layers=4)  # for two stages on each of two ranks
PIPELINES = {  # (pp, dp_replicate, dp_shard, cp) -> the same, and a schedule
    (2, 1, 1, 1): [
        (sequential(), "full", QWEN2),
        (parallel(), "selective", EXPERTS),
        (parallel(), "none", FOUR, "InterleavedZeroBubble"),
    ],
    (2, 1, 2, 1): [(parallel(), "none", ARGS), (sequential(), "full", QWEN2)],
}
MORE_PIPELINES = {
    (2, 1, 1, 1): [
        (MTP(num_future_tokens=1), "none", QWEN2),
        (parallel(engine="joint"), "selective", ARGS),
        (parallel(heads="medusa"), "none", QWEN2, "GPipe"),
        (parallel(target="trunk", detach_trunk=True), "none", DEEPSEEK),
        (sequential(target="trunk", detach_trunk=True), "none", QWEN2),
        (sequential(share_weights=True, trunk_state="raw"), "full", DEEPSEEK, "GPipe"),
        (parallel(train="trunk"), "none", FOUR, "Interleaved1F1B"),
        (sequential(), "full", replace(QWEN2, n_layers=4), "LoopedBFS"),
        (sequential(), "selective", FOUR, "InterleavedZeroBubble"),
        (parallel(engine="joint"), "none", replace(DEEPSEEK, n_layers=4), "ZBVZeroBubble"),
        (parallel(), "full", FOUR, "ZBVZeroBubble"),
    ],
    (2, 1, 2, 1): [
        (parallel(), "selective", EXPERTS),
        (parallel(), "none", FOUR, "InterleavedZeroBubble"),
        (sequential(), "none", FOUR, "Interleaved1F1B"),
    ],
    (2, 2, 1, 1): [(parallel(), "none", QWEN2), (sequential(), "full", EXPERTS)],
    (2, 1, 1, 2): [(parallel(), "none", QWEN2), (sequential(), "full", EXPERTS)],
    (2, 1, 2, 1, 1, 2): [
        *WITH_EP,
        (parallel(), "selective", replace(DEEPSEEK, n_layers=4), "Interleaved1F1B"),
    ],
    (2, 1, 1, 1, 2): WITH_TP,
    (2, 1, 2, 1, 2): [
        *WITH_TP[::2],
        (parallel(), "none", replace(FOUR, **WIDE), "InterleavedZeroBubble"),
    ],
    (4, 1, 1, 1): [
        (parallel(), "none", FOUR, "GPipe"),
        (sequential(), "full", replace(QWEN2, n_layers=4), "GPipe"),
    ],
}
MESHES = {  # (dp_replicate, dp_shard, cp, tp, ep) -> (mtp, activation checkpointing, shape) each
    (1, 2, 1): [
        (parallel(engine="joint"), "selective", QWEN2),
        (parallel(), "full", QWEN2),
        (parallel(detach_trunk=True), "none", ARGS),
        (parallel(train="heads"), "none", ARGS),
        (sequential(loss_reduction="mean"), "none", ARGS),
        (sequential(share_weights=True), "full", QWEN2),
        (sequential(trunk_state="raw"), "none", ARGS),
        (sequential(trunk_state="raw", train="heads"), "none", ARGS),
        (sequential(detach_trunk=True), "none", ARGS),
        (parallel(), "selective", EXPERTS),
        (sequential(train="heads"), "none", EXPERTS),
        (parallel(heads="medusa"), "none", QWEN2),
        (parallel(heads="medusa", engine="joint", detach_trunk=True), "full", ARGS),
        (parallel(target="trunk"), "none", QWEN2),
        (parallel(target="trunk", detach_trunk=True, target_loss="tv"), "none", ARGS),
        (parallel(target="trunk"), "full", EXPERTS),
        (sequential(target="trunk", target_loss="tv", target_weight=0.7), "none", ARGS),
    ],
    (1, 4, 1): [
        (parallel(), "none", ARGS),
        (sequential(), "none", EXPERTS),
        (parallel(), "full", FEW_EXPERTS),
    ],
    (2, 2, 1): [
        (parallel(engine="joint"), "none", ARGS),
        (sequential(), "none", EXPERTS),
    ],
    (2, 1, 1): [(parallel(), "none", ARGS)],
    (1, 1, 2): [
        (parallel(engine="joint"), "selective", QWEN2),
        (parallel(target="trunk"), "full", ARGS),
        (sequential(share_weights=True, detach_trunk=True), "full", QWEN2),
        (sequential(), "selective", EXPERTS),
        (sequential(target="trunk", target_loss="tv", target_weight=0.7), "none", CAUSAL),
    ],
    (1, 2, 1, 1, 2): WITH_EP,
    (1, 1, 1, 2): [
        (parallel(), "selective", replace(QWEN2, **WIDE)),
        (sequential(share_weights=True, detach_trunk=True), "full", replace(ARGS, **WIDE)),
        (sequential(target="trunk"), "none", replace(EXPERTS, **WIDE)),
    ],
    (1, 1, 2, 2): [(sequential(), "none", replace(EXPERTS, **WIDE))],
}
# Of what the cases above have on another mesh or with another shape.
MORE = {
    (1, 2, 1): [
        (parallel(engine="joint"), "none", ARGS),
        (parallel(), "none", ARGS),
        (sequential(train="heads"), "none", ARGS),
        (sequential(share_weights=True), "full", DEEPSEEK),
    ],
    (1, 4, 1): [(sequential(), "none", ARGS), (sequential(), "none", DEEPSEEK)],
    (2, 2, 1): [(parallel(), "none", ARGS)],
    (1, 1, 2): [
        (parallel(detach_trunk=True), "none", CAUSAL),
        (sequential(loss_reduction="mean"), "none", ARGS),
        (parallel(heads="medusa"), "none", QWEN2),
        (parallel(target="trunk"), "full", EXPERTS),
        (parallel(target="trunk", engine="joint", target_weight=0.5), "none", ARGS),
    ],
    (1, 2, 2): WITH_CP,
    (2, 1, 2): WITH_CP,
    (1, 1, 3): WITH_CP,
    (1, 2, 1, 1, 2): [
        (parallel(), "none", EXPERTS),
        (parallel(detach_trunk=True), "none", EXPERTS),
        (parallel(train="heads"), "none", EXPERTS),
        (parallel(target="trunk"), "full", EXPERTS),
        (sequential(), "none", EXPERTS),
        (sequential(train="heads"), "none", EXPERTS),
        (sequential(share_weights=True), "full", DEEPSEEK),
    ],
    (1, 4, 1, 1, 2): WITH_EP,
    (1, 4, 1, 1, 4): WITH_EP,
    (2, 2, 1, 1, 2): WITH_EP,
    (1, 1, 2, 1, 2): WITH_EP,
    (1, 2, 2, 1, 2): WITH_EP,
    (1, 2, 2, 1, 4): WITH_EP,
    (2, 2, 2, 1, 4): WITH_EP,
    (1, 1, 1, 2, 2): [(mtp, ac, replace(args, vocab_size=30)) for mtp, ac, args in WITH_EP],
    (1, 2, 1, 2, 2): WITH_EP_AND_TP,
    (1, 2, 1, 2, 4): WITH_EP_AND_TP,
    (1, 2, 2, 2, 4): WITH_EP_AND_TP,
    (1, 1, 1, 2): [
        *WITH_TP,
        (parallel(engine="joint", detach_trunk=True), "selective", replace(ARGS, **WIDE)),
        (parallel(train="heads"), "full", replace(EXPERTS, **WIDE)),
        (sequential(train="heads", loss_reduction="mean"), "none", replace(QWEN2, **WIDE)),
        (parallel(heads="medusa"), "none", replace(QWEN2, **WIDE)),
        (parallel(), "none", replace(FEW_EXPERTS, **WIDE)),
    ],
    (1, 2, 1, 2): WITH_TP,
    (2, 1, 1, 2): WITH_TP,
    (1, 1, 2, 2): WITH_TP,
    (1, 1, 1, 4): [(sequential(), "none", replace(EXPERTS, n_heads=4, vocab_size=32))],
    (1, 2, 2, 2): WITH_TP,
}


ALL = {(1, *d): cases for d, cases in MESHES.items()} | PIPELINES
ALL_MORE = {(1, *d): cases for d, cases in MORE.items()} | MORE_PIPELINES


def name_of(degrees: tuple[int, ...]) -> str:
    return "x".join(map(str, degrees if degrees[0] > 1 else degrees[1:]))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("degrees", "cases"),
    [pytest.param(Degrees(*d), cases, id=name_of(d)) for d, cases in ALL.items()]
    + [
        pytest.param(Degrees(*d), cases, id=f"{name_of(d)}, more", marks=pytest.mark.exhaustive)
        for d, cases in ALL_MORE.items()
    ],
)
def test_ranks_compute_what_one_process_does(degrees, cases):
    results = run_ranks(degrees.ranks, steps_on_rank, degrees, cases, timeout=240)
    for i, (mtp, ac, *args) in enumerate(cases):
        loss, expected, expert_state = naive_step(degrees, mtp, *args)
        assert {name for of_rank in results for name in of_rank[i][1]} == expected.keys()
        for found_loss, found, found_state in (of_rank[i] for of_rank in results):
            for name, state in found_state.items():
                assert torch.equal(state, expert_state[name]), (mtp, ac, name)
            assert abs(found_loss.item() / loss.item() - 1) < 1e-5, (mtp, ac)
            assert degrees.pp > 1 or found.keys() == expected.keys()
            for name in found:
                if (gradient := expected[name]) is None:
                    assert found[name] is None or found[name].count_nonzero() == 0, (mtp, ac, name)
                else:
                    error = relative_error(found[name].double(), gradient)
                    assert error < 1e-5, (mtp, ac, name)
