"""Sequential heads, a chain (DeepSeek-V3, arXiv 2412.19437, section 2.2, equations 21 to 23): h_1
is the whole ordinary model, after its final norm, and for k = 2..n

    h_k = norm_k(block_k(M_k [enorm_k(emb(t[i+k-1])) ; hnorm_k(h_{k-1})])).

(With `trunk_state = "raw"`, as vLLM runs MiMo, head 2 reads the state before the final norm
instead of h_1.)

Head by head: a chain has to keep a head's state until the next head has used it. So all heads run
forward first, each checkpointed (by `apply_activation_checkpointing`), and only the n states [N, D]
stay. Then, from the last head to the first, each loss is computed just before its head's backward:

    x = trunk(t);  h_2 = head_2(x.detach());  h_k = head_k(h_{k-1}.detach())
    for k in n..2:  backward(loss_k(h_k));  backward(head_k) into h_{k-1}, into x for k = 2
    backward(loss_1(norm(x)));  backward(trunk)

A state's gradient overwrites the state. In one graph both would be needed at once: checkpointing
computes head k + 1 from h_k a second time.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from torchtitan_mtp.config import MTP
from torchtitan_mtp.models.attention import KVCache
from torchtitan_mtp.models.heads import (
    BlockContext,
    Heads,
    HeadsInput,
    HeadsOutput,
    TrunkOutput,
    TrunkParts,
)
from torchtitan_mtp.models.layers import NormParams, normalize
from torchtitan_mtp.mtp.schedule import (
    begin_no_sync,
    fsdp_units,
    head_order,
    loss_backward,
    next_backward_is_last,
    sync_in_next_backward,
    unshard_ahead,
)
from torchtitan_mtp.ops import LossOutput


class SequentialHead(nn.Module):
    """One MTP module: the next hidden state from the previous one and the token in between."""

    def __init__(self, trunk: TrunkParts) -> None:
        super().__init__()
        dim = trunk.args.dim
        self.enorm, self.hnorm = trunk.new_norm(), trunk.new_norm()
        self.eh_proj = nn.Linear(2 * dim, dim, bias=False)
        self.block = copy.deepcopy(trunk.head_layer)
        self.norm = trunk.new_norm()

    def forward(
        self,
        h: Tensor,
        emb: Tensor,
        context: BlockContext,
        cache: KVCache | None = None,
        trunk_norm: NormParams | None = None,
    ) -> Tensor:
        """h_k [B, S, D], normalised, from h = h_{k-1} and emb [B, S, D] or [B, W, S/W, D].

        With `trunk_norm`, the trunk's final norm, h is the state before that norm, applied here.
        """
        if trunk_norm is not None:
            h = normalize(h, trunk_norm)
        emb = self.enorm(emb).reshape(h.shape)
        x = self.eh_proj(torch.cat((emb, self.hnorm(h)), dim=-1))  # [B, S, 2D] -> D
        return self.norm(context.run(self.block, x, cache))

    def init_std(self, name: str) -> float:
        """Standard deviation of the weight `name` at initialisation: its block's, else 0.02."""
        if not name.startswith("block."):
            return 0.02
        return self.block.init_std(name.removeprefix("block."))  # type: ignore[operator]


class SequentialHeads(Heads):
    """A chain of modules behind the whole model; with `share_weights` one module, n - 1 times.

    trunk_state: what the first of them reads of the trunk (`mtp.trunk_state`).
    """

    reads_future_tokens = True

    def __init__(self, trunk: TrunkParts, mtp: MTP) -> None:
        super().__init__(trunk, mtp.num_future_tokens, mtp.detach_trunk)
        self.trunk_state = mtp.trunk_state
        modules = 1 if mtp.share_weights else mtp.num_future_tokens - 1
        self.heads = nn.ModuleList(SequentialHead(trunk) for _ in range(modules))

    def module(self, k: int) -> nn.Module:
        """The module that computes h_k, k = 2..n."""
        return self.heads[min(k - 2, len(self.heads) - 1)]

    def modules_used_by(self, k: int) -> list[nn.Module]:
        """As `Heads.modules_used_by`: its own and all before it."""
        return list(self.heads[: k - 1])

    def lookahead(self, embedded: Tensor, k: int) -> Tensor:
        """Head k's input embeddings, those of t[i+k-1]: [B, W, S/W, D], a view of
        `TrunkOutput.embedded`."""
        length = embedded.shape[2] - self.num_future_tokens + 1
        return embedded[:, :, k - 1 : k - 1 + length]

    def hidden(self, k: int, h: Tensor, emb: Tensor, context: BlockContext) -> Tensor:
        """h_k [B, S, D], k = 2..n, from h_{k-1} and its `lookahead` embeddings.

        h_2 comes from the trunk's state. The final norm is applied inside the module's call, so
        that checkpointing keeps that state alone for the backward."""
        if k > 2:
            return self.module(k)(h, emb, context)
        h, norm = self.trunk_input(h)
        trunk_norm = norm if self.trunk_state == "normalized" else None
        return self.module(k)(h, emb, context, trunk_norm=trunk_norm)

    def forward(self, trunk: TrunkOutput) -> list[Tensor]:
        """As `Heads.forward`."""
        h, context, embedded = trunk
        assert embedded is not None
        hiddens = [self.trunk_parts.norm(h)]
        if self.detach_trunk:
            embedded = embedded.detach()
        for k in range(2, self.num_future_tokens + 1):
            h = self.hidden(k, h, self.lookahead(embedded, k), context)
            hiddens.append(h)
        return hiddens

    def first_module(self, taught: bool) -> nn.Module:
        """As `Heads.first_module`."""
        return self.module(2)

    def turns(self, given: HeadsInput) -> HeadsOutput:
        """As `Heads.turns`."""
        model, batch, trunk, head_loss, reduce = given
        n, last_layer = self.num_future_tokens, list(model.layers.values())[-1]
        state, context, embedded = trunk  # [B, S, D], [B, W, S/W+n-1, D]
        assert embedded is not None
        trained = state.requires_grad
        into_trunk = trained and not self.detach_trunk
        outputs, states, tokens = self._forwards(state, context, embedded, into_trunk)
        d_embedded: Tensor | None = None
        if head_loss.options.target_loss is not None:
            with torch.no_grad():
                model.teach(head_loss, model.norm(states[1]))
        # The heads too: what FSDP2 prefetches for the next backward would be freed before it.
        begin_no_sync(model, (*model.layers.values(), *self.heads))
        # A frozen trunk's head 1 has no backward; else it comes last, for under detach_trunk it is
        # the only one whose gradient reaches `output`.
        order = head_order(n, head_1_last=trained)
        losses: dict[int, LossOutput] = {}
        roots: list[Tensor] = []
        gradients: list[Tensor] = []
        for k in order:
            last, state, output = k == order[-1], states.pop(k), outputs.pop(k)
            if last:
                sync_in_next_backward(reduce, model.output)
            hidden = state if k > 1 else model.norm(state)
            if k == 1 and trained:
                unshard_ahead(last_layer)
            losses[k] = loss_backward(model, batch, head_loss, k, hidden, last)
            if k > 1:
                if k == 2 or self.module(k) is not self.module(k - 1):
                    for unit in fsdp_units(self.module(k)):
                        unit.set_reshard_after_backward(True)
                    sync_in_next_backward(reduce, self.module(k))
                if last:
                    next_backward_is_last(model, reduce)
                with record_function(f"backward of head {k}"):
                    output.backward(state.grad)
                if into_trunk:
                    if d_embedded is None:  # not before head n's loss, beside which it would stand
                        dtype = torch.promote_types(embedded.dtype, torch.float32)
                        d_embedded = torch.zeros_like(embedded, dtype=dtype)
                    grad = tokens.pop(k).grad
                    assert grad is not None
                    self.lookahead(d_embedded, k).add_(grad)
            elif trained:
                assert state.grad is not None
                roots, gradients = [output], [state.grad]
                if d_embedded is not None:
                    roots.append(embedded)
                    gradients.append(d_embedded.to(embedded.dtype))
        return HeadsOutput(losses, roots, gradients)

    def _forwards(
        self, state: Tensor, context: BlockContext, embedded: Tensor, into_trunk: bool
    ) -> tuple[dict[int, Tensor], dict[int, Tensor], dict[int, Tensor]]:
        """All heads', each in a graph of its own. outputs[k] is what head k + 1 reads (h_k; of head
        1 the state before its norm), with its graph back to states[k-1] and tokens[k], the
        embeddings; states[k] is the same cut from it."""
        n = self.num_future_tokens
        outputs = {1: state}
        states = {1: state.detach().requires_grad_(state.requires_grad)}
        tokens = {
            k: self.lookahead(embedded, k).detach().requires_grad_(into_trunk)
            for k in range(2, n + 1)
        }
        for k in range(2, n + 1):
            unshard_ahead(self.module(k + 1) if k < n else None)
            with record_function(f"head {k}"):
                outputs[k] = self.hidden(k, states[k - 1], tokens[k], context)
            states[k] = outputs[k].detach().requires_grad_()
        return outputs, states, tokens
