"""Tensor parallelism with sequence parallelism (Korthikanti et al. 2022, arXiv 2205.05198): the
ranks of a group share the work on the same tokens.

Each has some of every layer's attention heads and hidden units and a part of the vocabulary, whose
products run over all positions; between them, every position is computed once: the residual stream
[B, S / size, D], norms, projections of heads, routers and experts are of a rank's own positions.
Entering such a product gathers positions, leaving it sums the ranks' parts of the result and
scatters them; the backward does the reverse.

Weights that are not split here see other positions on every rank, as they see other data on the
ranks of data parallelism: FSDP2 shards them over these ranks too, and sums their gradients
(`torchtitan_mtp.distributed.parallelize`).

Split weights are DTensors, as FSDP2 and checkpoints take them, but products run on this rank's part
as a plain tensor, taken from FSDP2's before a block begins. (torch's own styles make DTensors of
activations too; a compiled block that is checkpointed fails with any DTensor in torch 2.13.)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.func import functional_call

from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.args import ModelArgs
from torchtitan_mtp.models.context_parallel import SequenceRanks
from torchtitan_mtp.models.latent_attention import LatentAttention
from torchtitan_mtp.models.transformer import TransformerBlock
from torchtitan_mtp.models.trunk import Trunk
from torchtitan_mtp.ops import VocabularyShard

_OWN = "own_parts"  # of a layer that is split


class Split(ParallelStyle):
    """How a module is run by the ranks.

    dim: of a linear layer, along which its weight is split: 0, this rank has some outputs, or 1,
    some inputs, whose products are to be summed; None: it is whole. before: a function of the
    module's first argument; after: of its output.
    """

    def __init__(
        self,
        dim: int | None = None,
        before: Callable[[Tensor], Tensor] | None = None,
        after: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.dim, self.before, self.after = dim, before, after

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        compute = module.forward
        if self.dim is not None:
            bare = copy.deepcopy(module)  # on the meta device: it lends its forward, no weight
            split_parameters(module, device_mesh, self.dim)
            own: dict[str, Tensor] = {}  # as `take_own_parts` fills it
            setattr(module, _OWN, own)

            def compute(x: Tensor) -> Any:
                return functional_call(bare, own, (x,))

        def forward(x: Tensor, *others: Any) -> Tensor:
            out: Tensor = compute(x if self.before is None else self.before(x), *others)
            return out if self.after is None else self.after(out)

        module.forward = forward
        return module


class SplitVocabulary(ParallelStyle):
    """An embedding of which this rank has some tokens: [B, S] -> [B, S / size, D]."""

    def __init__(self, ranks: SequenceRanks) -> None:
        self.ranks = ranks

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        split_parameters(module, device_mesh, 0)

        def forward(tokens: Tensor) -> Tensor:
            weight = own_parts(module)["weight"]
            own = tokens - self.ranks.rank * len(weight)
            others = (own < 0) | (own >= len(weight))
            rows = F.embedding(own.masked_fill(others, 0), weight)
            return self.ranks.scatter(rows.masked_fill(others.unsqueeze(-1), 0))

        module.forward = forward
        return module


def split_parameters(module: nn.Module, mesh: DeviceMesh, dim: int) -> None:
    """Make a module's own parameters DTensors, of which this rank has a part along `dim`."""
    for name, param in module.named_parameters(recurse=False):
        part = distribute_tensor(param, mesh, [Shard(dim)], src_data_rank=None)
        setattr(module, name, nn.Parameter(part, requires_grad=param.requires_grad))


def take_own_parts(unit: nn.Module) -> None:
    """Give the split layers of a block what this rank has of their weights, in each of its calls:
    after FSDP2 gathered them, and outside of what is compiled or checkpointed."""
    split = [(module, getattr(module, _OWN)) for module in unit.modules() if hasattr(module, _OWN)]

    def take(*_: Any) -> None:
        for module, own in split:
            own.update(own_parts(module))

    unit.register_forward_pre_hook(take)


def own_parts(module: nn.Module) -> dict[str, Any]:
    """What this rank has of a module's own parameters, by name."""
    parameters = module.named_parameters(recurse=False)
    return {n: p.to_local() if isinstance(p, DTensor) else p for n, p in parameters}


def plan_of_block(block: TransformerBlock, ranks: SequenceRanks) -> dict[str, ParallelStyle]:
    """How each module of a block, the trunk's or a head's, is split; what is not named is not."""
    plan: dict[str, ParallelStyle] = {"attention.wo": Split(1, after=ranks.scatter)}
    if isinstance(block.attention, LatentAttention):
        # Narrow vectors are made of a rank's own positions and gathered, not the input.
        query = "wq_b" if block.attention.shape.q_lora_rank else "wq"
        plan[f"attention.{query}"] = Split(0, before=ranks.gather)
        plan["attention.wkv_a"] = Split(after=ranks.gather)
        plan["attention.wkv_b"] = Split(0)
    else:
        plan["attention"] = Split(before=ranks.gather)
        plan |= {f"attention.{name}": Split(0) for name in ("wq", "wk", "wv")}
    if block.feed_forward is not None:
        plan["feed_forward"] = Split(before=ranks.gather)
        plan |= {f"feed_forward.{name}": Split(0) for name in ("w1", "w3")}
        plan["feed_forward.w2"] = Split(1, after=ranks.scatter)
    return plan


def check_sizes(args: ModelArgs, degree: int) -> None:
    """Error: a model's sizes that `degree` ranks can't share."""
    key, vocabulary = f"parallelism.tensor_parallel_degree = {degree}", args.vocab_size or 0
    sizes = {"n_heads": args.n_heads}
    if args.moe is None or args.moe.n_dense_layers:  # experts stay whole
        sizes["hidden_dim"] = args.ffn_dim
    if args.latent is None:
        sizes["n_kv_heads"] = args.kv_heads
    for name, size in sizes.items():
        if size % degree:
            common = math.gcd(*sizes.values())
            fit = [d for d in range(1, common + 1) if common % d == 0]
            nearest = min(fit, key=lambda d: abs(d - degree))
            raise UserError(
                f"{key}: expected a divisor of the model's {name}, {size}; the nearest that fits "
                f"all of its sizes is {nearest}"
            )
    if vocabulary % degree:
        common = math.gcd(vocabulary, *sizes.values())
        lower = next(d for d in range(degree, 0, -1) if common % d == 0)
        raise UserError(
            f"model.vocab_size = {vocabulary}: expected a multiple of {key}; the next is "
            f"{-(-vocabulary // degree) * degree}, set it for new weights, or lower the degree to "
            f"{lower} for stored ones"
        )


def apply_tensor_parallel(model: Trunk, mesh: DeviceMesh, ranks: SequenceRanks) -> None:
    """Split a model on the meta device over the ranks of a one-dimensional mesh, in place.

    Errors: those of `check_sizes`.
    """
    check_sizes(model.args, ranks.size)
    for _, unit in model.named_blocks():
        for module in unit.modules():
            if isinstance(module, TransformerBlock):
                parallelize_module(module, mesh, plan_of_block(module, ranks))
        take_own_parts(unit)
    if model.tok_embeddings is not None:  # a stage of a pipeline may have none
        parallelize_module(model.tok_embeddings, mesh, SplitVocabulary(ranks))
        model.tie_weights()
    if model.output is not None:
        if not isinstance(model.output.weight, DTensor):
            split_parameters(model.output, mesh, 0)
        model.output.vocabulary = VocabularyShard.of(mesh.get_group(), model.output.out_features)
    model.tensor_ranks = ranks.size
