"""Balance of experts over all ranks (Wang et al. 2024, arXiv 2408.15664)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from torchtitan_mtp.distributed.mesh import all_reduce
from torchtitan_mtp.models.trunk import Trunk
from torchtitan_mtp.transfer import send_to_host


def weigh_balance_losses(model: Trunk, head_weights: Sequence[float], sequences: int) -> None:
    """Set what each mixture's sequence-wise loss counts in a step of `sequences`, over all ranks
    and micro-batches: alpha for their mean, times the weight of the head that the mixture is part
    of (of a module that serves several heads, their mean).
    """
    if model.args.moe is None or not model.args.moe.aux_loss_coeff:
        return
    for name, moe in model.named_moe_layers():
        weight = 1.0
        if name.startswith("mtp.heads."):
            served = head_weights[1 + int(name.split(".")[2]) :: model.spec.num_modules]
            weight = sum(served) / len(served)
        moe.aux_loss_scale.fill_(weight * moe.args.aux_loss_coeff / sequences)


@contextmanager
def apart_from_training(*parts: Trunk) -> Iterator[None]:
    """For forwards without a backward of a model, or of the stages of one that this rank has: they
    leave no parameter gathered and count no tokens."""
    mixtures = [moe for part in parts for _, moe in part.named_moe_layers()]
    counts = [(c := moe.tokens_per_expert, c.clone()) for moe in mixtures]
    with torch.no_grad():
        yield
    for count, before in counts:
        count.copy_(before)
    for module in (module for part in parts for module in part.modules()):
        if isinstance(module, FSDPModule):
            module.reshard()


class ExpertLoads(NamedTuple):
    """Tokens of each expert in one step, over all ranks and micro-batches.

    names: of the blocks with experts; counts: [len(names), E] int64, on the device.
    """

    names: list[str]
    counts: Tensor

    def send(self) -> Callable[[], dict[str, float]]:
        """For every block: its fullest expert's tokens over the mean, 1 when all have as many, and
        the entropy of the shares as a fraction of the largest there is, log E. These are under way
        to the host; the result waits for them."""
        shares = self.counts.double() / self.counts.sum(1, keepdim=True).clamp(min=1)
        experts = self.counts.shape[1]
        fullest = experts * shares.amax(1)
        entropy = torch.special.entr(shares).sum(1) / math.log(max(experts, 2))
        kinds = ("load_max_over_mean", "load_entropy")
        tags = [f"moe/{name}/{kind}" for name in self.names for kind in kinds]
        arrive = send_to_host(torch.stack((fullest, entropy), dim=1).flatten())
        return lambda: dict(zip(tags, arrive(), strict=True))


@torch.no_grad()
def balance_experts(
    model: Trunk, rest: Sequence[str] = (), group: dist.ProcessGroup | None = None
) -> ExpertLoads | None:
    """Move every expert's bias once, after a step, by what the step's tokens were; count anew.

    An expert with fewer tokens than the mean gains `load_balance_coeff`, one with more loses it.
    Less the mean of these moves, which changes no choice, biases don't drift away together. A
    frozen router's biases stay, and those of modules at `rest` (by name). None for a model without
    experts. group: the ranks that have the same blocks (`World.stage`).
    """
    mixtures = dict(model.named_moe_layers())
    if not mixtures:
        return None
    counts = torch.stack([moe.tokens_per_expert for moe in mixtures.values()])  # [M, E]
    all_reduce(counts, group=group)
    tokens = counts.double()
    moves = torch.sign(tokens.mean(1, keepdim=True) - tokens)
    moves -= moves.mean(1, keepdim=True)
    for (name, moe), move in zip(mixtures.items(), moves, strict=True):
        if moe.router.gate.weight.requires_grad and name not in rest:
            moe.expert_bias += moe.args.load_balance_coeff * move
        moe.tokens_per_expert.zero_()
    return ExpertLoads(list(mixtures), counts)
