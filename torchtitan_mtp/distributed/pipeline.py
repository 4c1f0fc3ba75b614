"""Stages of a model on several ranks, which hand on micro-batches: torch's schedules, with heads.

The last stage's trunk gives its state z to the schedule, whose loss function runs the heads on it,
forward and backward, and returns a number whose gradient is what they leave in z:

    dz = backward of all heads (`heads_backward`);   loss = (z * dz).sum();   d loss / d z = dz

So the schedule orders the trunk's stages alone, and heads run as they do on one process.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.distributed.tensor import DTensor

from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.data.run import micro_batches_in_window
from torchtitan_mtp.data.targets import Batch
from torchtitan_mtp.distributed.mesh import World, set_timeout
from torchtitan_mtp.distributed.parallelize import parallelize
from torchtitan_mtp.distributed.stages import (
    ONE_STAGE,
    check_schedule,
    cut,
    has_copy,
    join,
    layers_of_stages,
    stages_of_rank,
)
from torchtitan_mtp.models.heads import TrunkOutput
from torchtitan_mtp.models.trunk import Trunk
from torchtitan_mtp.mtp.engine import heads_backward
from torchtitan_mtp.ops import LossOptions, LossOutput

logger = logging.getLogger(__name__)


class Pipeline:
    """This rank's stages of a model, and the schedule that runs them.

    Args:
        model: the whole, on the meta device with its converters applied.
        heads_cost: as in `layers_of_stages`.
        windows: of a loader, that a step reads.

    Attributes:
        model: all that this rank has, under the names that it has in the whole model.
        parts: its stages, each parallelized.
        copied: the embedding's weight that the last stage has beside the first's, if this is it.

    Errors: those of `layers_of_stages` and `check_schedule`.
    """

    def __init__(
        self,
        model: Trunk,
        config: JobConfig,
        world: World,
        param_dtype: torch.dtype,
        seed: int,
        options: LossOptions,
        *,
        heads_cost: float,
        windows: int,
    ) -> None:
        mesh, parallelism = world.dimension("pp"), config.parallelism
        assert mesh is not None
        in_window = micro_batches_in_window(config)
        micro_batches = windows * in_window
        self.group, self.rank, ranks = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        schedule = parallelism.pipeline_parallel_schedule
        check_schedule(parallelism, model, micro_batches, in_window)
        layers = layers_of_stages(parallelism, model.args.n_layers, heads_cost)
        count = len(layers)
        own = [stages_of_rank(rank, ranks, count, schedule) for rank in range(ranks)]
        self.owner = {stage: rank for rank, stages in enumerate(own) for stage in stages}
        self.stages = cut(model, layers, own[self.rank])
        self.parts = [*self.stages.values()]
        for part in self.parts:
            parallelize(part, config, world, param_dtype, seed)
        self.model, self.last = join(model, self.parts), self.stages.get(count - 1)
        self.device, self.dtype, self.tp = world.device, param_dtype, world.degrees.tp
        self.options, self.engine = options, config.mtp.engine
        self.copies = has_copy(model)
        self.copied: nn.Parameter | None = None
        if self.last is not None and self.copies:
            self.copied = cast(nn.Parameter, self.last.tok_embeddings.weight)
        size = parallelism.pipeline_parallel_microbatch_size
        length = config.training.seq_len // parallelism.context_parallel_degree
        state = self._state(size, length, device="meta", requires_grad=True)
        self.running = [_Stage(self, i, state) for i in self.stages]
        kind: Any = get_schedule_class(schedule)
        first = self.running[0] if schedule in ONE_STAGE else self.running
        self.schedule = kind(first, micro_batches, loss_fn=self._loss, scale_grads=False)
        logger.info(
            "pipeline of %d stages on %d ranks (%s): %s layers; %d micro-batches of %d",
            *(count, ranks, schedule, ", ".join(str(len(stage)) for stage in layers)),
            *(micro_batches, size),
        )
        # A stage whose only block is head 1 hands its input on; nothing is done to it in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

    def _state(self, sequences: int, length: int, **how: Any) -> Tensor:
        """What stages hand on of micro-batches of that shape: [B, S, D], uninitialised. Ranks of
        tensor parallelism have a part of S each."""
        size = (sequences, length // self.tp, self.model.args.dim)
        return torch.empty(size, dtype=self.dtype, **how)

    def set_timeout(self, seconds: int) -> None:
        """As `mesh.set_timeout`, in which gloo leaves sends as they were: these get a new group."""
        set_timeout(seconds)
        if self.device.type == "cpu":
            ranks, timeout = dist.get_process_group_ranks(self.group), timedelta(seconds=seconds)
            self.group = dist.new_group(ranks, timeout, use_local_synchronization=True)
            for stage in self.running:
                stage.group = self.group

    def step(self, batches: Sequence[Batch], head_scales: Tensor) -> list[LossOutput]:
        """Forward and backward of a step's micro-batches; gradients add to `.grad`, reduced over
        the ranks that share a stage. The losses of each, on the rank that has the last stage."""
        self.batches = [batch.to(self.device) for batch in batches]
        self.head_scales, self.trunks = head_scales, dict[int, TrunkOutput]()
        self.losses: list[LossOutput] = []
        if self.last is not None:
            keep_gradients(self.last, self.engine == "joint" or self.last.mtp is None)
        index = torch.arange(len(batches))
        self.schedule.step(index=index, target=index, return_outputs=False)
        self._sum_copies()
        return self.losses

    def _loss(self, state: Tensor, index: Tensor) -> Tensor:
        """Of the last stage's output on a micro-batch: the losses and backwards of its heads."""
        i, model = int(index), self.last
        assert model is not None
        trunk = self.trunks.pop(i)
        out, roots, gradients = heads_backward(
            model, self.batches[i], trunk, self.head_scales, self.options, self.engine
        )
        self.losses.append(out)
        (z, *embedded), (dz, *d_embedded) = roots, gradients
        if embedded:  # nothing of it goes to another stage
            torch.autograd.backward(embedded, d_embedded)
        return (z * dz).sum()

    def forward(self, batch: Batch) -> list[Tensor] | None:
        """As a model's forward, without gradients: the heads' hidden states, on the rank that has
        the last stage. All ranks call it together, with a batch on their device."""
        state: Tensor | None = None
        for i, part in self.stages.items():
            if i and self.owner[i - 1] != self.rank:
                state = self._state(*batch.tokens.shape, device=self.device)
                dist.recv(state, self._peer(i - 1), self.group)
            trunk = part.forward_trunk(batch, state)
            state = trunk.state
            if part is self.last:
                return [part.norm(state)] if part.mtp is None else part.mtp(trunk)
            if self.owner[i + 1] != self.rank:
                dist.send(state.contiguous(), self._peer(i + 1), self.group)
        return None

    def gather(self, values: dict[str, float]) -> dict[str, float]:
        """What every rank of the pipeline has, in the order of the ranks."""
        everyone: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(everyone, values, group=self.group)
        return {name: value for found in everyone for name, value in found.items()}

    def _peer(self, stage: int) -> int:
        return dist.get_global_rank(self.group, self.owner[stage])

    def _sum_copies(self) -> None:
        """The embedding's gradient on the first and the last stage: of both, each has the sum."""
        ends = {0: len(self.owner) - 1, len(self.owner) - 1: 0}
        mine = [i for i in self.stages if i in ends]
        if not self.copies or not mine:
            return
        weight, peer = self.stages[mine[0]].tok_embeddings.weight, self._peer(ends[mine[0]])
        if not weight.requires_grad:
            return
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        grad = weight.grad.to_local() if isinstance(weight.grad, DTensor) else weight.grad
        other = torch.empty_like(grad)
        operations = [
            dist.P2POp(dist.isend, grad, peer, self.group),
            dist.P2POp(dist.irecv, other, peer, self.group),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        grad += other


class _Stage(PipelineStage):
    """Runs a stage's trunk on the micro-batch that `index` names. It is told the shape of what it
    gets and gives, and tries nothing to find it out."""

    def __init__(self, pipeline: Pipeline, index: int, state: Tensor) -> None:
        super().__init__(
            pipeline.stages[index],
            index,
            len(pipeline.owner),
            pipeline.device,
            input_args=(state,) if index else (),
            output_args=(state,),
            group=pipeline.group,
        )
        self.pipeline = pipeline

    def forward_maybe_with_nosync(self, *states: Tensor, index: Tensor) -> Tensor:
        """What torch's schedules call: the state before this stage, if any, to that after it."""
        pipeline, i = self.pipeline, int(index)
        trunk = cast(Trunk, self.submod).forward_trunk(pipeline.batches[i], *states)
        if self.is_last:
            pipeline.trunks[i] = trunk
        return trunk.state


def keep_gradients(last: Trunk, joint: bool) -> None:
    """Have FSDP2 do in the backwards of the heads what torch's schedule has it do in its own:
    nothing is reduced before the end of the step, and what is unsharded stays so.

    joint: all heads run forward before the first backward. Else their turns see to it, unit by
    unit, for FSDP2 can't keep gradients of what it has never unsharded.
    """
    if isinstance(last, FSDPModule):
        last.set_is_last_backward(False)
        last.set_reshard_after_backward(False)
        if joint:
            last.set_requires_gradient_sync(False)
