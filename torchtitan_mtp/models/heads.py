"""What a trunk and the heads on it know of each other.

A family of heads (`torchtitan_mtp.mtp.transform`) is a subclass of `Heads`. It sees `TrunkEnd` when
it is built and `TrunkOutput` for every batch, and nothing else of the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from torchtitan_mtp.data.targets import Batch
from torchtitan_mtp.models.args import ModelArgs
from torchtitan_mtp.models.attention import AttentionContext
from torchtitan_mtp.models.layers import Norm
from torchtitan_mtp.ops import HeadByHeadLoss, LossOutput

if TYPE_CHECKING:
    from torchtitan_mtp.models.transformer import Transformer


class TrunkEnd(NamedTuple):
    """Where a trunk ends: its sizes, its last block, its final norm."""

    args: ModelArgs
    last_layer: nn.Module
    norm: nn.RMSNorm


class TrunkOutput(NamedTuple):
    """What heads stand on, of one batch.

    state [B, S, D]: after the last layer and before the final norm, or under the last layer
    (`Heads.below_last_layer`). context: which all blocks share. embedded [B, S+n-1, D]: embeddings
    of the batch's tokens and of those after them, where the heads read these
    (`Heads.reads_tokens_ahead`).
    """

    state: Tensor
    context: AttentionContext
    embedded: Tensor | None = None


class Heads(nn.Module):
    """Heads 2..n; what `Transformer.mtp` holds. Parameters are named `mtp.heads.{j}.*`.

    Each of `heads` is what activation checkpointing, compilation and FSDP2 wrap, and has
    `init_std(name)` as a block has. `independent`: no head reads another's state. So each one's
    backward can follow its forward, and all may share a graph in which states give way to their
    gradients.
    """

    independent = False
    below_last_layer = False
    reads_tokens_ahead = False
    heads: nn.ModuleList

    def __init__(self, end: TrunkEnd, num_future_tokens: int, detach_trunk: bool) -> None:
        super().__init__()
        self.end = end  # in a tuple, so that these modules stay the trunk's alone
        self.num_future_tokens = num_future_tokens
        self.detach_trunk = detach_trunk

    def reached(self, k: int) -> list[nn.Module]:
        """Those of `heads` under head k's loss, k = 2..n: its own, where none reads another's."""
        return [self.heads[k - 2]]

    def forward(self, trunk: TrunkOutput) -> list[Tensor]:
        """The hidden states [B, S, D] of heads 1..n, normalised, in one graph."""
        raise NotImplementedError

    def head_by_head(
        self, model: Transformer, batch: Batch, head_loss: HeadByHeadLoss, reduce: bool
    ) -> dict[int, LossOutput]:
        """The forwards and backwards of one micro-batch: each head's loss by its number 1..n.

        reduce: whether gradients are reduced over the ranks now.
        """
        raise NotImplementedError

    def of_trunk(self, state: Tensor, detach: bool = True) -> tuple[Tensor, Norm]:
        """A state of the trunk and its final norm, for a head to be computed from; cut from the
        trunk under `detach_trunk` unless told not to `detach`."""
        scale, eps = self.end.norm.weight, self.end.norm.eps
        assert eps is not None
        # (Without gradients there is nothing to detach, and one kind of call less to compile.)
        if self.detach_trunk and detach and torch.is_grad_enabled():
            return state.detach(), Norm(scale.detach(), eps)
        return state, Norm(scale, eps)
