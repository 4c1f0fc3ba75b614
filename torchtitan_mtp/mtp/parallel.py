"""Parallel heads (Gloeckle et al. 2024, arXiv 2404.19737, section 2): with z the input of
the trunk's last layer,

    h_k = norm(block_k(z)),  k = 1..n;          block_1 is the model's own last layer.

Head by head, the paper's figure 2: each head runs forward, through the loss and backward before the
next one starts, and leaves its gradient in z; then the trunk's backward runs once:

    z = trunk(x)
    for k in n..1:  backward(loss_k(head_k(z.detach())));  dz += gradient of z
    z.backward(dz)

Only one head's activations are alive at a time, memory does not grow with n, and nothing is
computed twice. (Heads that learn from head 1 come after it, and a copy of its state stays.)
"""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from torchtitan_mtp.config import MTP
from torchtitan_mtp.models.heads import (
    BlockContext,
    Heads,
    HeadsInput,
    HeadsOutput,
    TrunkOutput,
    TrunkParts,
)
from torchtitan_mtp.mtp.schedule import (
    begin_no_sync,
    head_order,
    loss_backward,
    next_backward_is_last,
    sync_in_next_backward,
    unshard_ahead,
)
from torchtitan_mtp.ops import LossOutput


class IndependentHeads(Heads):
    """Heads that read the trunk's state and nothing of one another."""

    independent = True

    def block(self, k: int) -> nn.Module | None:
        """The module that only head k = 1..n uses; None if it has none."""
        return self.heads[k - 2] if k > 1 else None

    def hidden(self, k: int, state: Tensor, context: BlockContext) -> Tensor:
        """Head k's hidden state [B, S, D] from `TrunkOutput.state`."""
        raise NotImplementedError

    def forward(self, trunk: TrunkOutput) -> list[Tensor]:
        """As `Heads.forward`."""
        heads = range(1, self.num_future_tokens + 1)
        return [self.hidden(k, trunk.state, trunk.context) for k in heads]

    def first_module(self, taught: bool) -> nn.Module | None:
        """As `Heads.first_module`."""
        return self.block(1 if taught else self.num_future_tokens)

    def turns(self, given: HeadsInput) -> HeadsOutput:
        """As `Heads.turns`."""
        model, batch, trunk, head_loss, reduce = given
        n, taught = self.num_future_tokens, head_loss.options.target_loss is not None
        layers, (z, context, _) = model.trunk_layers(), trunk  # z [B, S, D]
        dz = torch.zeros_like(z, dtype=torch.promote_types(z.dtype, torch.float32))
        # A frozen trunk's head 1 has no backward; where it is the teacher, it has to run first.
        order = head_order(n, z.requires_grad and not taught)
        last_to_output = 1 if self.detach_trunk else order[-1]
        # Not the heads' own blocks: FSDP2 has not unsharded them yet in this micro-batch.
        begin_no_sync(model, layers)
        following = [*(self.block(k) for k in order[1:]), *(layers[-1:] if z.requires_grad else ())]
        losses: dict[int, LossOutput] = {}
        for k, block in itertools.zip_longest(order, following):
            last = k == last_to_output
            # What no later head uses is reduced as soon as this head's backward is done.
            sync_in_next_backward(reduce, self.block(k), model.output if last else None)
            if k == order[-1] and not z.requires_grad:
                next_backward_is_last(model, reduce)
            leaf = z.detach().requires_grad_(z.requires_grad)
            with record_function(f"head {k}"):
                hidden = self.hidden(k, leaf, context)
            if taught and k == 1:
                model.teach(head_loss, hidden)
            unshard_ahead(block)
            losses[k] = loss_backward(model, batch, head_loss, k, hidden, last)
            if leaf.grad is not None:
                dz += leaf.grad
        if not z.requires_grad:
            return HeadsOutput(losses, [], [])
        return HeadsOutput(losses, [z], [dz.to(z.dtype)])


class ParallelHeads(IndependentHeads):
    """Heads 2..n beside the model's last layer, which is head 1."""

    reads_before_last_layer = True

    def __init__(self, trunk: TrunkParts, mtp: MTP) -> None:
        super().__init__(trunk, mtp.num_future_tokens, mtp.detach_trunk)
        layers = (copy.deepcopy(trunk.head_layer) for _ in range(mtp.num_future_tokens - 1))
        self.heads = nn.ModuleList(layers)

    def block(self, k: int) -> nn.Module:
        """As `IndependentHeads.block`."""
        return super().block(k) or self.trunk_parts.last_layer

    def hidden(self, k: int, state: Tensor, context: BlockContext) -> Tensor:
        """As `IndependentHeads.hidden`."""
        state, norm = self.trunk_input(state, detach=k > 1)
        return context.run(self.block(k), state, norm=norm)
