"""Which rank has which experts, where ranks share them (`models.expert_parallel`): each rank has as
many, and FSDP2 shards them over the ranks that have the same."""

from __future__ import annotations

import itertools

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from torchtitan_mtp.distributed.mesh import World
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.moe import Experts, MoE
from torchtitan_mtp.models.trunk import Trunk
from torchtitan_mtp.mtp.schedule import unshard_beside


def share_experts(model: Trunk, world: World) -> None:
    """Leave each rank of `world.expert_parallel` the experts of its own, in every mixture.

    Error: the model has no experts, or the ranks don't divide them.
    """
    ranks, mesh = world.expert_parallel, world.experts
    if ranks is None or mesh is None:
        return
    key, moe_args = f"parallelism.expert_parallel_degree = {ranks.size}", model.args.moe
    if moe_args is None:
        raise UserError(f"{key}: the model has no experts to share; expected 1, set it")
    if (count := moe_args.num_experts) % ranks.size:
        fit = [d for d in range(1, count + 1) if count % d == 0]
        nearest = min(fit, key=lambda d: abs(d - ranks.size))
        raise UserError(
            f"{key}: expected a divisor of the experts of a layer, num_experts = {count}; the "
            f"nearest is {nearest}"
        )
    for _, moe in model.named_moe_layers():
        moe.expert_parallel = ranks
        for name, param in list(moe.experts.named_parameters()):
            own = distribute_tensor(param, mesh["ep"], [Shard(0)], src_data_rank=None)
            setattr(moe.experts, name, nn.Parameter(own, requires_grad=param.requires_grad))


def shared_experts(block: nn.Module) -> list[Experts]:
    """The experts in a block that ranks share: FSDP2 units of their own, with a mesh of theirs."""
    mixtures = (part for part in block.modules() if isinstance(part, MoE))
    return [moe.experts for moe in mixtures if moe.expert_parallel is not None]


def sharding_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Of `World.experts`, what FSDP2 shards the experts of a rank over (and replicates)."""
    return mesh[tuple(name for name in mesh.mesh_dim_names or () if name != "ep")]


def placement(mesh: DeviceMesh, param: nn.Parameter) -> Shard:
    """How FSDP2 shards matrices [E, *, *] of a rank's experts: by expert where each rank then has
    as many, else within them."""
    ranks = mesh["efsdp"].size()
    even = (param.shape[0] // mesh["ep"].size(), *param.shape[1:])
    return Shard(next((dim for dim, size in enumerate(even) if size % ranks == 0), 0))


def prefetch_experts(model: Trunk) -> None:
    """Unshard a layer and its experts while the layer before it runs. (FSDP2 would start in time if
    the host ran ahead of the device, but it waits for the sizes of what ranks exchange.)"""
    for layer, following in itertools.pairwise(model.layers.values()):
        unshard_beside(layer, following)
