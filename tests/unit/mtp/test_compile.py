"""Compiled blocks: one whole graph for each kind of block, however many layers and heads there are,
and none after the first step and the first evaluation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from tests.small import ARGS, DEEPSEEK, perturb_norms, relative_error, small_window
from torchtitan_mtp.config import MTP, JobConfig
from torchtitan_mtp.data.targets import IGNORE, make_batch
from torchtitan_mtp.distributed.mesh import init_world
from torchtitan_mtp.distributed.parallelize import parallelize
from torchtitan_mtp.models.args import ModelArgs
from torchtitan_mtp.models.transformer import build_model
from torchtitan_mtp.mtp import ENGINES, add_heads, head_scales, head_weights
from torchtitan_mtp.ops import LossOptions, linear_cross_entropy

# More than the recompilations that torch.compile allows a function (8): one a layer would raise.
LAYERS, N = 10, 4

PARALLEL = {"heads": "parallel"}
# Without gradients the graphs are others.
CASES = {  # name -> ([mtp] table, activation checkpointing, graphs to train with, to evaluate with)
    # A parallel block before `output` normalises; of a chain, the first module does its input.
    # Heads that wait for one another are checkpointed, the trunk is not.
    "parallel, joint": ({**PARALLEL, "engine": "joint"}, "none", 3, 3),
    "parallel, checkpointed": (PARALLEL, "full", 2, 2),
    # Heads on a detached state need no gradient of their input.
    "parallel, detached": ({**PARALLEL, "engine": "joint", "detach_trunk": True}, "none", 3, 3),
    # Every second block of the trunk is checkpointed, every head.
    "sequential, checkpointed": ({"heads": "sequential"}, "selective", 4, 4),
    "medusa": ({"heads": "medusa"}, "none", 2, 2),
    "sequential, shared": ({"heads": "sequential", "share_weights": True}, "none", 3, 3),
    # The first block is dense.
    "experts": ({"heads": "sequential"}, "none", 4, 4),
    "experts, checkpointed": (PARALLEL, "full", 3, 3),
}
# Graphs are Dynamo's, the same whatever compiles them. AOTAutograd goes on with these: of experts,
# it alone keeps a checkpoint's second forward from counting their tokens again.
AHEAD_OF_TIME = ("experts", "experts, checkpointed")
# A chain's modules, which are checkpointed, are among the "experts".
USUAL = ("parallel, joint", "parallel, checkpointed", "medusa", "experts")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # at these sizes several only wait for one another
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()
    if dist.is_initialized():
        dist.destroy_process_group()


def graphs() -> int:
    """Graphs compiled since the last reset; with `fullgraph` one for each kind of call."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class SmallRun:
    """A model on one rank, its train step and its evaluation."""

    def __init__(self, mtp: MTP, ac: str, backend: str | None, shape: ModelArgs = ARGS) -> None:
        config = JobConfig()
        config.mtp, self.mtp = mtp, mtp
        config.training.mixed_precision_param = "float32"
        config.activation_checkpoint.mode = ac
        config.activation_checkpoint.selective_ac_option = "2"
        if backend is not None:
            config.compile.enable, config.compile.backend = True, backend
        world = init_world(config.parallelism)
        self.device = world.device
        model = add_heads(build_model(replace(shape, n_layers=LAYERS)), mtp)
        self.model = parallelize(model, config, world, torch.float32, seed=0)
        perturb_norms(self.model)

    def batch(self, seed: int):
        return make_batch(small_window(2, 12 + N, seed=seed), N).to(self.device)

    def step(self, seed: int) -> dict[str, torch.Tensor]:
        """Two micro-batches; the gradients, and the tokens of each expert."""
        batch = self.batch(seed)
        scales = head_scales(head_weights(self.mtp, 1, 10), (batch.labels != IGNORE).sum((0, 1)))
        self.model.zero_grad()
        counts = {
            name: moe.tokens_per_expert.zero_() for name, moe in self.model.named_moe_layers()
        }
        for last in (False, True):
            ENGINES[self.mtp.engine](self.model, batch, scales, LossOptions(), last)
        return {
            name: p.grad.full_tensor().clone()
            for name, p in self.model.named_parameters()
            if p.grad is not None
        } | {name: count.float() for name, count in counts.items()}

    @torch.no_grad()
    def evaluate(self, seed: int) -> None:
        batch = self.batch(seed)
        self.model.output.loss(self.model(batch), batch.labels, linear_cross_entropy)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in USUAL else pytest.mark.exhaustive) for name in CASES],
)
def test_one_graph_a_kind_of_block(name):
    table, ac, trained, evaluated = CASES[name]
    shape = DEEPSEEK if name.startswith("experts") else ARGS
    mtp = MTP(num_future_tokens=N, **table)
    run = SmallRun(mtp, ac, "aot_eager" if name in AHEAD_OF_TIME else "eager", shape)
    run.step(0)
    assert graphs() == trained
    run.evaluate(1)
    assert graphs() == trained + evaluated
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = run.step(2)
        run.evaluate(3)
        run.step(4)
    assert graphs() == trained + evaluated
    expected = SmallRun(mtp, ac, None, shape).step(2)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert relative_error(found[key], gradient) < 1e-5, key
