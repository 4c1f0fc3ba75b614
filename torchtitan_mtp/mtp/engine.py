"""The two ways to run n heads forward and backward; one result.

`joint` is ordinary autograd, with any backend of the loss: all hidden states, one loss, one
backward. Its heads' blocks are checkpointed (`apply_activation_checkpointing`
sees to that), so that a head leaves one state [N, D] behind, not its activations.

`head_by_head` runs the heads' losses and backwards in turn, so that what a head needs for its
backward is gone before the next one's loss. For parallel heads that is the algorithm of Gloeckle et
al. 2024, figure 2: the trunk runs once; each head runs forward, through the loss and backward
before the next one starts, and leaves its gradient in the trunk's state; then the trunk's backward
runs once:

    z = trunk(x)
    for k in n..1:  backward(loss_k(head_k(z.detach())));  dz += gradient of z
    z.backward(dz)

Only one head's activations are alive at a time, and memory does not grow with n, with nothing
computed twice.

A chain can't forget a head's state before the next head has used it. Its heads run forward first,
each checkpointed as above, and only the n states [N, D] stay. Then the chain is walked back, each
loss just before its head's backward:

    x = trunk(t);  h_2 = head_2(x.detach());  h_k = head_k(h_{k-1}.detach())
    for k in n..2:  backward(loss_k(h_k));  backward(head_k) into h_{k-1}, into x for k = 2
    backward(loss_1(norm(x)));  backward(trunk)

In all of them a state's gradient takes the place of the state. In one graph a chain would need both
at once, for h_k is what head k + 1 is computed from again; so a chain has no `joint` but with
another backend of the loss.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from torchtitan_mtp.data.targets import Batch
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.transformer import Transformer
from torchtitan_mtp.mtp.heads import ParallelHeads, SequentialHeads
from torchtitan_mtp.mtp.turns import (
    finish_with_next_backward,
    hold,
    reduce_after_next_backward,
    release,
    stay_gathered,
)
from torchtitan_mtp.ops import HeadByHeadLoss, LossOptions, LossOutput, heads_loss


def forward_loss(
    model: Transformer,
    batch: Batch,
    head_scales: Tensor,
    options: LossOptions,
    head_loss: HeadByHeadLoss | None = None,
) -> LossOutput:
    """The loss of all heads, with its graph where gradients are on.

    head_loss: what computes it in place of `heads_loss`, for one backward and no chain; states give
    way to their gradients. Without gradients under FSDP2, call `reshard()` on the FSDP modules
    afterwards: nothing else frees what a forward gathered.
    """
    hiddens, groups = model(batch), [slice(0, None)]
    if model.mtp is not None and model.mtp.detach_trunk:
        groups = [slice(0, 1), slice(1, None)]  # the others' gradient is kept from `output`
    outputs = []
    for heads in groups:
        compute = functools.partial(heads_loss, options=options, head_scales=head_scales[heads])
        if head_loss is not None:
            compute = functools.partial(head_loss, first=heads.start)
        detach = heads.start > 0
        outputs.append(model.output.loss(hiddens[heads], batch.labels[..., heads], compute, detach))
    return _together(outputs)


def joint(
    model: Transformer,
    batch: Batch,
    head_scales: Tensor,
    options: LossOptions,
    last_micro_batch: bool = True,
) -> LossOutput:
    """Forward and backward of one micro-batch in one graph; gradients add to `.grad`.

    `last_micro_batch`: whether gradients are reduced over the ranks now.

    Raises:
        UserError: a chain with the "chunked" loss.
    """
    chunked = options.backend == "chunked"
    if chunked and isinstance(model.mtp, SequentialHeads):
        raise UserError('mtp.engine = "joint": a chain has one way, "head_by_head"; set that')
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last_micro_batch)
        model.set_is_last_backward(last_micro_batch)
    head_loss = HeadByHeadLoss(head_scales, options) if chunked else None
    out = forward_loss(model, batch, head_scales, options, head_loss)
    out.loss.backward()
    return _detached(out)


def head_by_head(
    model: Transformer,
    batch: Batch,
    head_scales: Tensor,
    options: LossOptions,
    last_micro_batch: bool = True,
) -> LossOutput:
    """As `joint`, head by head."""
    if model.mtp is None:
        return joint(model, batch, head_scales, options, last_micro_batch)
    turns = _parallel_turns if isinstance(model.mtp, ParallelHeads) else _chained_turns
    outputs = turns(model, batch, HeadByHeadLoss(head_scales, options), last_micro_batch)
    release(model)
    return _together([outputs[k] for k in sorted(outputs)])


def backward_follows_forward(model: Transformer, engine: str) -> bool:
    """Whether each head's backward comes right after its forward: no two are alive at a time."""
    return engine == "head_by_head" and isinstance(model.mtp, ParallelHeads)


def _parallel_turns(
    model: Transformer, batch: Batch, head_loss: HeadByHeadLoss, last_micro_batch: bool
) -> dict[int, LossOutput]:
    heads = model.mtp
    z, context = model(batch, heads=False)  # [B, S, D]
    dz = torch.zeros_like(z, dtype=torch.promote_types(z.dtype, torch.float32))
    order = _order(heads.num_future_tokens, z.requires_grad)
    blocks = heads.head_blocks(model)
    # The heads' blocks stay as their own last turn left them: nothing has gathered them yet.
    hold(model, list(model.layers.values())[:-1])
    outputs: dict[int, LossOutput] = {}
    for k in order:
        last = k == order[-1]
        # What no later head uses is reduced as soon as this head's backward is through.
        done = (blocks[k - 1], model.output) if last else (blocks[k - 1],)
        reduce_after_next_backward(done, last_micro_batch)
        if last and not z.requires_grad:
            finish_with_next_backward(model, last_micro_batch)
        leaf = _leaf(z, z.requires_grad)
        hidden = heads.hidden(model, k, leaf, context)
        outputs[k] = _backward_of_loss(model, batch, head_loss, k, hidden, last)
        if leaf.grad is not None:
            dz += leaf.grad
    if z.requires_grad:
        finish_with_next_backward(model, last_micro_batch)
        z.backward(dz.to(z.dtype))
    return outputs


def _chained_turns(
    model: Transformer, batch: Batch, head_loss: HeadByHeadLoss, last_micro_batch: bool
) -> dict[int, LossOutput]:
    heads, n = model.mtp, model.mtp.num_future_tokens
    embedded, state, context = model(batch, heads=False)  # [B, S+n-1, D], [B, S, D]
    trained = state.requires_grad
    into_trunk = trained and not heads.detach_trunk
    d_embedded: Tensor | None = None
    # ends[k] is what head k + 1 reads (h_k; of head 1 the state before its norm), with its graph
    # back to states[k-1] and ahead[k]; states[k] is the same cut from it.
    ends, states = {1: state}, {1: _leaf(state, trained)}
    ahead = {k: _leaf(heads.ahead(embedded, k), into_trunk) for k in range(2, n + 1)}
    for k in range(2, n + 1):
        ends[k] = heads.hidden(model, k, states[k - 1], ahead[k], context)
        states[k] = _leaf(ends[k], True)
    hold(model, (*model.layers.values(), *heads.heads))
    stay_gathered(heads.heads, True)
    order = _order(n, trained)
    outputs: dict[int, LossOutput] = {}
    for k in order:
        last, state, end = k == order[-1], states.pop(k), ends.pop(k)
        if last:
            reduce_after_next_backward((model.output,), last_micro_batch)
        hidden = state if k > 1 else model.norm(state)
        outputs[k] = _backward_of_loss(model, batch, head_loss, k, hidden, last)
        if k > 1:
            if k == 2 or heads.module(k) is not heads.module(k - 1):
                stay_gathered((heads.module(k),), False)
                reduce_after_next_backward((heads.module(k),), last_micro_batch)
            if last:
                finish_with_next_backward(model, last_micro_batch)
            end.backward(state.grad)
            if into_trunk:
                if d_embedded is None:  # not before head n's loss, beside which it would stand
                    dtype = torch.promote_types(embedded.dtype, torch.float32)
                    d_embedded = torch.zeros_like(embedded, dtype=dtype)
                heads.ahead(d_embedded, k).add_(ahead.pop(k).grad)
        elif trained:
            finish_with_next_backward(model, last_micro_batch)
            roots, d_roots = [end], [state.grad]
            if d_embedded is not None:
                roots.append(embedded)
                d_roots.append(d_embedded.to(embedded.dtype))
            torch.autograd.backward(roots, d_roots)
    return outputs


def _order(n: int, trunk_trains: bool) -> list[int]:
    """Heads in the order of their losses: the last one is the last to need `output`."""
    extra = list(range(n, 1, -1))
    # A frozen trunk's head 1 has no backward; with a trunk that trains, head 1 comes last because
    # it is the only one whose gradient reaches `output` under detach_trunk.
    return [*extra, 1] if trunk_trains else [1, *extra]


def _backward_of_loss(
    model: Transformer, batch: Batch, head_loss: HeadByHeadLoss, k: int, hidden: Tensor, last: bool
) -> LossOutput:
    """Head k's loss and its backward; `hidden` [B, S, D] is lost."""
    compute = functools.partial(head_loss, first=k - 1, last=last)
    detach = model.mtp.detach_trunk and k > 1
    out = model.output.loss([hidden], batch.labels[..., k - 1 : k], compute, detach)
    if out.loss.requires_grad:
        out.loss.backward()
    return _detached(out)


def _leaf(x: Tensor, requires_grad: bool) -> Tensor:
    return x.detach().requires_grad_(requires_grad)


def _detached(out: LossOutput) -> LossOutput:
    return out._replace(loss=out.loss.detach())


def _together(outputs: Sequence[LossOutput]) -> LossOutput:
    """Outputs of some heads each, in the heads' order -> one of all."""
    if len(outputs) == 1:
        return outputs[0]
    losses, *statistics = zip(*outputs, strict=True)
    return LossOutput(torch.stack(losses).sum(), *(torch.cat(parts) for parts in statistics))


Engine = Callable[[Transformer, Batch, Tensor, LossOptions, bool], LossOutput]

engines: dict[str, Engine] = {"head_by_head": head_by_head, "joint": joint}
