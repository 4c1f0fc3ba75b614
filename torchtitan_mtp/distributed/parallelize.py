"""From a model on the meta device to one that trains on this job's ranks, in one readable order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp._fully_shard import _fsdp_common as fsdp
from torch.distributed.tensor import DTensor, Shard

from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.data.targets import Batch
from torchtitan_mtp.distributed.activation_checkpoint import apply_activation_checkpointing
from torchtitan_mtp.distributed.experts import (
    placement,
    prefetch_experts,
    sharding_mesh,
    share_experts,
    shared_experts,
)
from torchtitan_mtp.distributed.mesh import World, set_timeout
from torchtitan_mtp.distributed.tensor_parallel import apply_tensor_parallel
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.moe import Experts, MoE
from torchtitan_mtp.models.trunk import Trunk
from torchtitan_mtp.mtp.engine import ENGINES, backward_follows_forward
from torchtitan_mtp.ops import LossOptions, LossOutput

_MOST_BUFFERED = 4 * 2**30  # bytes of a block's gradients that may wait to be reduced


class OnePiece:
    """A model that is whole on every rank, or on the ranks that share its parameters, and how it
    runs; what `Pipeline` is for one in stages.

    Attributes:
        model: as `parallelize` returned it.
        parts: it alone.
    """

    group: dist.ProcessGroup | None = None  # the ranks with other parts of the model
    copied: nn.Parameter | None = None
    set_timeout = staticmethod(set_timeout)

    def __init__(self, model: Trunk, config: JobConfig, world: World, options: LossOptions) -> None:
        self.model, self.parts = model, [model]
        self.device, self.engine, self.options = world.device, ENGINES[config.mtp.engine], options
        self.always = config.training.reduce_every_micro_batch

    def step(self, batches: Sequence[Batch], head_scales: Tensor) -> Iterator[LossOutput]:
        """Forward and backward of a step's micro-batches; gradients add to `.grad`, reduced over
        the ranks. The losses of each."""
        for i, batch in enumerate(batches):
            reduce = self.always or i == len(batches) - 1
            batch = batch.to(self.device)
            yield self.engine(self.model, batch, head_scales, self.options, reduce)

    def forward(self, batch: Batch) -> list[Tensor]:
        """The heads' hidden states, n of [B, S, D]."""
        return self.model(batch)

    def gather(self, values: dict[str, float]) -> dict[str, float]:
        """Of all parts of the model: there are no others."""
        return values


def parallelize(
    model: Trunk, config: JobConfig, world: World, param_dtype: torch.dtype, seed: int
) -> Trunk:
    """Tensor, context and expert parallelism, checkpointing, compilation and FSDP2, block by block;
    then memory and weights.

    The model comes from the meta device with its converters applied (heads, float8). It returns
    materialised, sharded and initialised.
    """
    if config.compile.enable or config.loss_passes == "compiled":
        _check_backend(config.compile.backend)
    if world.tensor_parallel is not None:
        apply_tensor_parallel(model, world.mesh["tp"], world.tensor_parallel)
    model.context_parallel = world.context_parallel
    for _, moe in model.named_moe_layers():
        moe.sequence_ranks = world.sequence
    share_experts(model, world)
    apply_activation_checkpointing(model, config.activation_checkpoint, config.mtp.engine)
    if config.compile.enable and "model" in config.compile.components:
        for _, block in model.named_blocks():
            compile_block(block, config.compile.backend)
    apply_fsdp(model, config, world, param_dtype)
    model.to_empty(device="cpu" if config.training.enable_cpu_offload else world.device)
    model.tie_weights()
    if config.training.enable_cpu_offload:
        for module in model.modules():  # parameters alone: buffers go to where the forward runs
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(world.device)
    model.init_weights(seed)
    return model


def _check_backend(name: str) -> None:
    """Error: torch.compile has no such backend; the nearest is named."""
    known = torch._dynamo.list_backends(exclude_tags=())
    if name not in known:
        usual = ", ".join(torch._dynamo.list_backends())
        nearest = get_close_matches(name, known, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UserError(f'compile.backend = "{name}": torch.compile knows {usual}{hint}')


def compile_block(block: nn.Module, backend: str) -> None:
    """Compile a block in one graph; or, where ranks share its experts, the modules around these:
    how many rows they get is known to no compiler, and they are an FSDP2 unit of their own."""
    if not any(isinstance(part, MoE) and part.expert_parallel for part in block.modules()):
        block.compile(backend=backend, fullgraph=True)
        return
    for part in block.children():
        layers = [*part.children()]  # of torch's own layers, each is a kernel as it is
        if layers and not isinstance(part, Experts):
            compile_block(part, backend)


def apply_fsdp(model: Trunk, config: JobConfig, world: World, param_dtype: torch.dtype) -> None:
    """Shard parameters over `dp_shard` and `cp`, replicate over `dp_replicate`: FSDP2, HSDP. Those
    that tensor parallelism leaves whole are sharded over its ranks too (`_placements`).

    One rank takes the same way: its shard is the whole parameter, its mixed precision FSDP2's.

    Units: every block (trunk's and heads', its experts with it, unless ranks share them: then they
    are one of their own, sharded over the ranks that have the same), the embedding and `output`.
    The final norm, of which every head makes use, and tied embeddings stay with the root, which
    keeps them gathered from the first use to the last.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # angles and head scales stay float32
    )
    offload = OffloadPolicy()
    if config.training.enable_cpu_offload:
        # Pinned memory is for copies to a GPU, and without one there is none to be had.
        offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    # Over two dimensions FSDP2 holds what it has reduced until the backward ends.
    replicated, shards = world.dimension("dp_replicate"), world.mesh["fsdp"]
    shard = functools.partial(
        fully_shard,
        mesh=world.mesh["dp_replicate", "fsdp"] if replicated else shards,
        mp_policy=policy,
        offload_policy=offload,
        shard_placement_fn=_placements(world),
    )
    # A stage of a pipeline would gather its blocks anew for every micro-batch.
    kept = ("never",) if config.parallelism.pipeline_parallel_degree == 1 else ("never", "default")
    reshard = config.parallelism.fsdp_reshard_after_forward not in kept
    blocks = [block for _, block in model.named_blocks()]
    largest = max((sum(_local_size(p) for p in block.parameters()) for block in blocks), default=0)
    _shard_blocks(model, config, shard, world, reshard)
    if not model.args.tied_embeddings and model.tok_embeddings is not None:
        embedding = shard(model.tok_embeddings, reshard_after_forward=reshard)
        embedding.set_unshard_in_backward(False)  # which does not read it
    if not model.args.tied_embeddings and model.output is not None:
        shard(model.output, reshard_after_forward=False)
        for method in ("loss", "argmax"):
            register_fsdp_forward_method(model.output, method)
    root = shard(model, reshard_after_forward=False)
    register_fsdp_forward_method(model, "forward_trunk")
    turns = model.mtp is not None and config.mtp.engine == "head_by_head"
    if turns and shards.size() > 1 and 4 * largest <= _MOST_BUFFERED:
        overlap_reductions(root)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is normalised by global counts: gradients are summed, not averaged. One rank
            # has nothing to sum, and with a factor it would divide by 1 in a pass of its own.
            if world.size > 1:
                module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _shard_blocks(
    model: Trunk,
    config: JobConfig,
    shard: Callable[..., FSDPModule],
    world: World,
    reshard: bool,
) -> None:
    """Every block by `shard`, and before it, on their own mesh, those of its experts that ranks
    share."""
    one_after_another = backward_follows_forward(model, config.mtp.engine)
    blocks = [block for _, block in model.named_blocks()]
    for i, block in enumerate(blocks):
        # What the backward needs first is not worth freeing: the last block, and head by head
        # every parallel one, whose backward follows its forward at once.
        is_head = one_after_another and i >= len(model.layers) - 1
        again = reshard and not is_head and i < len(blocks) - 1
        if world.experts is not None:
            mesh, how = sharding_mesh(world.experts), functools.partial(placement, world.experts)
            for experts in shared_experts(block):
                shard(experts, mesh=mesh, shard_placement_fn=how, reshard_after_forward=again)
        shard(block, reshard_after_forward=again)
    if world.experts is not None:
        prefetch_experts(model)


def overlap_reductions(root: FSDPModule) -> None:
    """Let a head's gradients be reduced while the next head computes.

    Torch 2.13 waits for a reduction at the end of the backward that it began in, where all buffers
    are taken, and has one by default; torch before it does not wait there. The second one holds a
    block's gradients in float32, on every rank: of 8B 0.8 GiB, but of 671B 43.
    """
    if hasattr(root, "set_reduce_scatter_max_input_buffers"):
        root.set_reduce_scatter_max_input_buffers(2)


def _placements(world: World) -> Callable[[nn.Parameter], Any]:
    """How FSDP2 shards each parameter.

    Of those that tensor parallelism leaves whole, each of its ranks sees other positions: they are
    sharded over these ranks too.
    """
    replicated, tensor = world.dimension("dp_replicate"), world.dimension("tp")
    if tensor is None:
        return functools.partial(_placement, ranks=world.mesh["fsdp"].size())
    if not hasattr(fsdp, "ShardPlacementResult"):
        raise UserError(
            f"parallelism.tensor_parallel_degree = {tensor.size()}: FSDP2 of torch "
            f"{torch.__version__} has one mesh for all parameters; expected torch 2.12 or later"
        )
    mesh = world.mesh["fsdp", "tp"]._flatten("fsdp_tp")
    over = fsdp.FSDPMeshInfo(mesh, shard_mesh_dim=0)
    if replicated:
        mesh = world.mesh["dp_replicate", "fsdp_tp"]
        over = fsdp.HSDPMeshInfo(mesh, shard_mesh_dim=1, replicate_mesh_dim=0)

    def place(param: nn.Parameter) -> Any:
        if isinstance(param, DTensor):
            return None
        placement = _placement(param, ranks=over.shard_mesh_size) or Shard(0)
        return fsdp.ShardPlacementResult(placement, over)

    return place


def _placement(param: nn.Parameter, ranks: int) -> Shard | None:
    """By rows; stacked experts by expert, unless that would leave ranks without any."""
    by_row = param.ndim == 3 and ranks > param.shape[0] and param.shape[1] % ranks == 0
    return Shard(1) if by_row else None


def _local_size(param: nn.Parameter) -> int:
    """Numbers of a parameter that this rank has, before FSDP2 shards it."""
    return (param.to_local() if isinstance(param, DTensor) else param).numel()
