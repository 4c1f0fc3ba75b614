"""What a trunk and the heads on it know of each other.

A family of heads (`torchtitan_mtp.mtp.transform`) is a subclass of `Heads`. It gets `TrunkParts`
when it is built and `TrunkOutput` for every batch, and knows nothing else of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from torchtitan_mtp.data.targets import Batch
from torchtitan_mtp.models.args import ModelArgs
from torchtitan_mtp.models.layers import NormParams
from torchtitan_mtp.ops import HeadByHeadLoss, LossOutput

if TYPE_CHECKING:
    from torchtitan_mtp.models.trunk import Trunk


class TrunkParts(NamedTuple):
    """What heads are built from: the trunk's sizes, its last block, its final norm; the block that
    heads copy, and what makes a norm of theirs."""

    args: ModelArgs
    last_layer: nn.Module
    norm: nn.Module
    head_layer: nn.Module
    new_norm: Callable[[], nn.Module]


class BlockContext(Protocol):
    """What all blocks share in one forward, beside their input."""

    def run(
        self, block: nn.Module, x: Tensor, cache: Any = None, norm: NormParams | None = None
    ) -> Tensor:
        """A block's output [B, S, D] on x [B, S, D]. A `norm` is applied to it inside the block's
        call, so that a checkpointed or compiled block keeps nothing for it."""


class TrunkOutput(NamedTuple):
    """What the trunk computes for the heads, of one batch.

    Attributes:
        state: [B, S, D], the output of the last layer, before the final norm; or the input of the
            last layer, where the heads take that (`Heads.reads_before_last_layer`).
        context: what the attention of all blocks shares.
        embedded: [B, W, S/W+n-1, D], embeddings of the batch's tokens and of the n - 1 after them,
            where the heads read these (`Heads.reads_future_tokens`), for each of W contiguous
            pieces of the sequence: one, unless ranks share it.
    """

    state: Tensor
    context: BlockContext
    embedded: Tensor | None = None


class HeadsInput(NamedTuple):
    """What heads are run forward and backward on: a micro-batch, what the trunk made of it, and the
    loss. reduce: whether gradients are reduced over the ranks now."""

    model: Trunk
    batch: Batch
    trunk: TrunkOutput
    head_loss: HeadByHeadLoss
    reduce: bool


class HeadsOutput(NamedTuple):
    """What the heads make of a trunk's output: losses by head, 1..n; and what the trunk's backward
    begins with, tensors of `TrunkOutput` and their gradients, none where it is frozen."""

    losses: dict[int, LossOutput]
    roots: list[Tensor]
    gradients: list[Tensor]


class Heads(nn.Module):
    """Heads 2..n; what `Transformer.mtp` holds. Parameters are named `mtp.heads.{j}.*`.

    Each of `heads` is what activation checkpointing, compilation and FSDP2 wrap, and has
    `init_std(name)` as a block has. `independent`: no head reads another's state. So each head's
    backward can run right after its forward, and in a graph of all heads a state's gradient may
    overwrite the state.
    """

    independent = False
    reads_before_last_layer = False
    reads_future_tokens = False
    heads: nn.ModuleList

    def __init__(self, trunk: TrunkParts, num_future_tokens: int, detach_trunk: bool) -> None:
        super().__init__()
        self.trunk_parts = trunk  # in a tuple, so that these modules stay the trunk's alone
        self.num_future_tokens = num_future_tokens
        self.detach_trunk = detach_trunk

    def modules_used_by(self, k: int) -> list[nn.Module]:
        """Those of `heads` that head k's loss trains, k = 2..n: its own, unless in a chain."""
        return [self.heads[k - 2]]

    def forward(self, trunk: TrunkOutput) -> list[Tensor]:
        """The hidden states [B, S, D] of heads 1..n, normalised, in one graph."""
        raise NotImplementedError

    def first_module(self, taught: bool) -> nn.Module | None:
        """The module that runs first in `turns`; taught: where heads 2..n learn from head 1."""
        raise NotImplementedError

    def turns(self, given: HeadsInput) -> HeadsOutput:
        """The heads' forwards and backwards on one micro-batch, down to the trunk's output."""
        raise NotImplementedError

    def trunk_input(self, state: Tensor, detach: bool = True) -> tuple[Tensor, NormParams]:
        """The trunk's state and final norm as a head reads them: detached under `detach_trunk`,
        unless `detach` is false (head 1)."""
        norm = self.trunk_parts.norm
        weights: dict[str, Tensor] = dict(norm.named_parameters())
        # (Without gradients there is nothing to detach, and one kind of call less to compile.)
        if self.detach_trunk and detach and torch.is_grad_enabled():
            state, weights = state.detach(), {name: w.detach() for name, w in weights.items()}
        return state, NormParams(norm, weights)
