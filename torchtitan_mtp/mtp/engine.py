"""The two ways to run n heads forward and backward; one result.

`joint` is ordinary autograd: all hidden states, one loss, one backward. It suits every model.

`sequential` is the algorithm of Gloeckle et al. 2024, figure 2, for parallel heads. The trunk runs
once; then each head runs forward, through the loss and backward before the next one starts, and
leaves its gradient in the trunk's state; at the end the trunk's backward runs once:

    z = trunk(x)
    for k in n..1:  backward(loss_k(head_k(z.detach())));  dz += gradient of z
    z.backward(dz)

So only one head's activations are alive at a time and memory does not grow with n, with nothing
computed twice.

Under FSDP2 the n + 1 backwards have to look like one. FSDP2 ends every backward by reducing and
resharding what is unsharded, which would take `output`, `norm` and the root's own parameters from
under the later heads. `_hold` keeps these gathered, and every gradient local until it is complete:
so `output` is gathered once and its gradient reduced once, whatever n is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from torchtitan_mtp.data.targets import Batch
from torchtitan_mtp.models.transformer import Transformer
from torchtitan_mtp.mtp.heads import ParallelHeads
from torchtitan_mtp.ops import LossOptions, LossOutput
from torchtitan_mtp.ops.head_by_head import HeadByHeadLoss

LossArguments = dict[str, Any]


def forward_loss(
    model: Transformer, batch: Batch, head_scales: Tensor, loss: LossArguments
) -> LossOutput:
    """The loss of all heads, with its graph where gradients are on.

    loss: keyword arguments of `linear_cross_entropy`. Without gradients under FSDP2, call
    `reshard()` on the FSDP modules afterwards: nothing else frees what a forward gathered.
    """
    hiddens = model(batch)
    if not (model.mtp is not None and model.mtp.detach_trunk):
        return model.output(hiddens, batch.labels, head_scales, **loss)
    first = model.output(hiddens[:1], batch.labels[..., :1], head_scales[:1], **loss)
    rest = model.output(hiddens[1:], batch.labels[..., 1:], head_scales[1:], detach=True, **loss)
    return LossOutput(
        first.loss + rest.loss, *(torch.cat(pair) for pair in zip(first[1:], rest[1:], strict=True))
    )


def joint(
    model: Transformer,
    batch: Batch,
    head_scales: Tensor,
    loss: LossArguments,
    last_micro_batch: bool = True,
) -> LossOutput:
    """Forward and backward of one micro-batch in one graph; gradients add to `.grad`.

    `last_micro_batch`: whether gradients are reduced over the ranks now.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last_micro_batch)
        model.set_is_last_backward(last_micro_batch)
    norm = model.norm
    if isinstance(norm, FSDPModule):
        norm.set_reshard_after_backward(False)  # n uses, one gather
    out = forward_loss(model, batch, head_scales, loss)
    out.loss.backward()
    if isinstance(norm, FSDPModule):
        norm.set_reshard_after_backward(True)
        norm.reshard()
    return _detached(out)


def sequential(
    model: Transformer,
    batch: Batch,
    head_scales: Tensor,
    loss: LossArguments,
    last_micro_batch: bool = True,
) -> LossOutput:
    """As `joint`, head by head. A model without parallel heads has no heads to take in turn."""
    if not isinstance(model.mtp, ParallelHeads):
        return joint(model, batch, head_scales, loss, last_micro_batch)
    z, context = model(batch, heads=False)  # [B, S, D]
    dz = torch.zeros_like(z, dtype=torch.promote_types(z.dtype, torch.float32))
    options = {name: value for name, value in loss.items() if name != "backend"}
    head_loss = HeadByHeadLoss(head_scales, LossOptions(**options))
    outputs: list[LossOutput | None] = [None] * model.mtp.num_future_tokens
    order = _order(model, z)
    blocks = model.mtp.head_blocks(model)
    _hold(model)
    for k in order:
        # What no later head uses is reduced as soon as this head's backward is through.
        done = (blocks[k - 1],) if k != order[-1] else (blocks[k - 1], model.norm, model.output)
        _reduce_after_next_backward(done, last_micro_batch)
        if k == order[-1] and not z.requires_grad:
            _finish_with_next_backward(model, last_micro_batch)
        leaf = z.detach().requires_grad_(z.requires_grad)
        hidden = model.mtp.hidden(model, k, leaf, context)
        labels, aside = batch.labels[..., k - 1], model.mtp.detach_trunk and k > 1
        out = model.output(
            hidden, labels, detach=aside, head_loss=head_loss, head=k - 1, last=k == order[-1]
        )
        if out.loss.requires_grad:
            out.loss.backward()
        if leaf.grad is not None:
            dz += leaf.grad
        outputs[k - 1] = _detached(out)
    if z.requires_grad:
        _finish_with_next_backward(model, last_micro_batch)
        z.backward(dz.to(z.dtype))
    _reshard(model)
    return _stacked(outputs)


def _order(model: Transformer, z: Tensor) -> list[int]:
    """Heads in the order they run: the last one is the last to need `norm` and `output`."""
    extra = list(range(model.mtp.num_future_tokens, 1, -1))
    # A frozen trunk's head 1 has no backward; with a trunk that trains, head 1 comes last because
    # it is the only one whose gradient reaches `norm` and `output` under detach_trunk.
    return [*extra, 1] if z.requires_grad else [1, *extra]


def _hold(model: Transformer) -> None:
    """FSDP2: from now on no gradient is reduced, and what the heads share (`norm`, `output`, the
    root's own parameters) stays gathered.

    The heads' blocks are left as their own last turn left them: FSDP2 can't be told to keep the
    gradients of a block whose parameters were never gathered, as in the first step.
    """
    if not isinstance(model, FSDPModule):
        return
    model.set_is_last_backward(False)
    trunk = list(model.layers.values())[:-1]
    for part in (model, model.tok_embeddings, model.norm, model.output, *trunk):
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(False, recurse=False)
    for unit in (*_shared_units(model), model):
        unit.set_reshard_after_backward(False, recurse=False)


def _reduce_after_next_backward(units: Iterable[nn.Module], reduce: bool) -> None:
    """FSDP2: the units' gradients are complete with the next backward. `reduce`: whether this
    micro-batch reduces any.

    `norm` and `output` stay gathered all the same: FSDP2 prefetches in the reverse of the forwards'
    order, and before the last head's block comes another head's `output`, which would be gathered
    once more.
    """
    for unit in units:
        if isinstance(unit, FSDPModule):
            unit.set_requires_gradient_sync(reduce)


def _finish_with_next_backward(model: Transformer, reduce: bool) -> None:
    """FSDP2: the next backward is the step's last."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(reduce)
        model.set_is_last_backward(reduce)


def _reshard(model: Transformer) -> None:
    """FSDP2: the end of `_hold`."""
    if not isinstance(model, FSDPModule):
        return
    for unit in (*_shared_units(model), model):
        unit.set_reshard_after_backward(True, recurse=False)
        unit.reshard()


def _shared_units(model: Transformer) -> list[FSDPModule]:
    return [m for m in (model.norm, model.output) if isinstance(m, FSDPModule)]


def _detached(out: LossOutput) -> LossOutput:
    return out._replace(loss=out.loss.detach())


def _stacked(outputs: list[LossOutput | None]) -> LossOutput:
    """n outputs of one head -> one of n heads."""
    heads = [out for out in outputs if out is not None]
    losses, *statistics = (torch.stack(parts) for parts in zip(*heads, strict=True))
    return LossOutput(losses.sum(), *statistics)


Engine = Callable[[Transformer, Batch, Tensor, LossArguments, bool], LossOutput]

engines: dict[str, Engine] = {"joint": joint, "sequential": sequential}
