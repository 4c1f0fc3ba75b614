"""How often FSDP2 gathers and reduces with n heads: `output` once, trunk blocks as without MTP, and
once where they stay gathered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed.fsdp._fully_shard._fsdp_param_group as fsdp

from spawn import run_ranks
from tests.small import ARGS, small_window
from torchtitan_mtp.config import MTP, JobConfig
from torchtitan_mtp.data.targets import make_batch
from torchtitan_mtp.distributed.mesh import init_world
from torchtitan_mtp.distributed.parallelize import parallelize
from torchtitan_mtp.distributed.pipeline import Pipeline
from torchtitan_mtp.models.transformer import build_model
from torchtitan_mtp.models.trunk import Trunk
from torchtitan_mtp.mtp import ENGINES, add_heads
from torchtitan_mtp.ops import LossOptions
from two_ranks import counted

PLAIN = MTP(num_future_tokens=1)
MODELS = {
    "plain": PLAIN,
    **{
        f"{engine} {n}": MTP(num_future_tokens=n, engine=engine)
        for engine in ("joint", "head_by_head")
        for n in (2, 6)
    },
    "chain 6": MTP(num_future_tokens=6, heads="sequential"),
}


KEPT = ["plain", "joint 2", "head_by_head 2", "chain 6"]


def steps_on_rank(rank: int):
    found = {name: collectives_of_a_step(mtp) for name, mtp in MODELS.items()}
    return found, {name: collectives_of_a_step(MODELS[name], "never") for name in KEPT}


def collectives_of_a_step(mtp: MTP, reshard: str = "default") -> tuple[Counter[str], Counter[str]]:
    """Unit -> how often its parameters were gathered, and its gradients reduced, in the third step
    of one micro-batch."""
    config = JobConfig()
    config.mtp = mtp
    config.parallelism.fsdp_reshard_after_forward = reshard
    world = init_world(config.parallelism)
    model = add_heads(build_model(ARGS), mtp)
    model = parallelize(model, config, world, torch.float32, seed=0)
    n = mtp.num_future_tokens
    batch = make_batch(small_window(2, 9 + n), n)
    engine = ENGINES[mtp.engine]
    return of_units(model, lambda: engine(model, batch, torch.ones(n), LossOptions(), True))


def of_units(model: Trunk, step: Callable[[], object]) -> tuple[Counter[str], Counter[str]]:
    """Of the third step; the first find the order of the units."""

    def unit(fsdp_params: Sequence[Any], *_: Any) -> str:
        return fsdp_params[0]._param_fqn.rsplit(".", 1)[0]

    for _ in range(3):
        model.zero_grad()
        with (
            counted(fsdp, "foreach_all_gather", what=unit) as gathered,
            counted(fsdp, "foreach_reduce", what=unit) as reduced,
        ):
            step()
    return gathered, reduced


def pipeline_on_rank(rank: int):
    return {name: collectives_of_a_pipeline(MODELS[name]) for name in ("plain", *PIPELINED)}


def collectives_of_a_pipeline(mtp: MTP) -> tuple[Counter[str], Counter[str]]:
    """As `collectives_of_a_step`, on one of two stages: of two micro-batches."""
    config = JobConfig()
    config.mtp, config.training.seq_len, config.training.local_batch_size = mtp, 9, 2
    config.parallelism.pipeline_parallel_degree = 2
    config.parallelism.pipeline_parallel_microbatch_size = 2
    world, n = init_world(config.parallelism), mtp.num_future_tokens
    model = add_heads(build_model(ARGS), mtp)
    how = (config, world, torch.float32, 0, LossOptions())
    pipeline = Pipeline(model, *how, heads_cost=0.0, windows=2)
    batches = [make_batch(small_window(2, 9 + n), n)] * 2
    return of_units(pipeline.model, lambda: pipeline.step(batches, torch.ones(n)))


PIPELINED = ("joint 2", "head_by_head 2", "head_by_head 6", "chain 6")


@pytest.mark.exhaustive
def test_a_stage_gathers_and_reduces_once_a_step():
    """Whatever the heads and the micro-batches; but a chain's modules are freed after each."""
    results = run_ranks(4, pipeline_on_rank, timeout=200)
    for name in PIPELINED:
        for rank, (gathered, reduced) in enumerate(of_rank[name] for of_rank in results):
            plain, _ = results[rank]["plain"]
            own = {unit: k for unit, k in gathered.items() if unit.startswith("mtp.")}
            assert bool(own) == (rank > 1)
            assert set(own.values()) <= {2 if name == "chain 6" else 1}
            copy = {"tok_embeddings"} if name == "chain 6" and rank > 1 else set()
            assert gathered.keys() - own == plain.keys() | copy
            assert {k for unit, k in gathered.items() if unit not in own} == {1}
            assert reduced == Counter(gathered.keys()), name


def test_heads_add_only_their_own_collectives():
    results = run_ranks(2, steps_on_rank, timeout=200)
    assert results[0] == results[1]
    found, kept = results[0]
    plain_gathered, plain_reduced = found.pop("plain")
    assert plain_gathered["output"] == 1 and plain_gathered["layers.0.attention.wq"] == 2
    assert plain_gathered["tok_embeddings"] == 1  # its backward does not read it
    last = f"layers.{ARGS.n_layers - 1}.attention.wq"  # head 1: no longer the model's last block
    for name, (gathered, reduced) in found.items():
        own = {unit: k for unit, k in gathered.items() if unit.startswith("mtp.")}
        trunk = {unit: k for unit, k in gathered.items() if unit not in own}
        assert len(own) == MODELS[name].num_future_tokens - 1
        assert trunk | {last: 1} == plain_gathered, name
        once = name.startswith("head_by_head")  # its backward follows its forward at once
        assert all(k == 1 if once else k <= 2 for k in (*own.values(), trunk[last])), (name, own)
        assert reduced == Counter([*plain_reduced, *own]), name
    for name, (gathered, reduced) in kept.items():
        assert gathered == reduced, name
        assert set(gathered.values()) == {1}, name
