"""What the schedules of all families are made of: a head's loss with its backward, and FSDP2 under
one backward after another.

FSDP2 ends every backward by reducing and resharding what is unsharded. A schedule's many backwards
have to look like one, or they would take `output` and the root's own parameters (the final norm's
among them) from under the heads that are still to come. `begin_backwards` keeps these unsharded,
and every gradient local until it is complete: so `output` is gathered once and its gradient reduced
once, whatever n is. All that is about FSDP2 does nothing to a model without it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from torchtitan_mtp.data.targets import Batch
from torchtitan_mtp.models.transformer import Transformer
from torchtitan_mtp.ops import HeadByHeadLoss, LossOutput, accumulation_dtype


def head_order(n: int, trunk_trains: bool) -> list[int]:
    """Heads in the order of their losses: the last one is the last to need `output`."""
    extra = list(range(n, 1, -1))
    # A frozen trunk's head 1 has no backward; with a trunk that trains, head 1 comes last because
    # it is the only one whose gradient reaches `output` under detach_trunk.
    return [*extra, 1] if trunk_trains else [1, *extra]


def loss_backward(
    model: Transformer, batch: Batch, head_loss: HeadByHeadLoss, k: int, hidden: Tensor, last: bool
) -> LossOutput:
    """Head k's loss and its backward; `hidden` [B, S, D] is lost."""
    assert model.mtp is not None
    compute = functools.partial(head_loss, first=k - 1, last=last)
    detach = model.mtp.detach_trunk and k > 1
    out = model.output.loss([hidden], batch.labels[..., k - 1 : k], compute, detach)
    if out.loss.requires_grad:
        out.loss.backward()
    return out._replace(loss=out.loss.detach())


def fsdp_units(*modules: object) -> list[FSDPModule]:
    """Those of the modules that FSDP2 shards as units; none without FSDP2."""
    return [module for module in modules if isinstance(module, FSDPModule)]


def begin_backwards(model: Transformer, blocks: Iterable[nn.Module]) -> None:
    """From now on no gradient of `blocks` and of what the heads share (`output`, the embedding, the
    root's own parameters) is reduced, and what they share stays unsharded.

    blocks: those whose parameters a forward has gathered before: FSDP2 can't be told to keep the
    gradients of any other.
    """
    for unit in fsdp_units(model):
        unit.set_is_last_backward(False)
    for unit in fsdp_units(model, model.tok_embeddings, model.output, *blocks):
        unit.set_requires_gradient_sync(False, recurse=False)
    for unit in fsdp_units(model.output, model):
        unit.set_reshard_after_backward(False, recurse=False)


def next_backward_completes(reduce: bool, *units: nn.Module | None) -> None:
    """The gradients of `units` are complete with the next backward. `reduce`: whether this
    micro-batch reduces any.

    `output` stays unsharded all the same: FSDP2 prefetches in the reverse of the forwards' order,
    and before the last head's block comes another head's `output`, which would be gathered once
    more.
    """
    for unit in fsdp_units(*units):
        unit.set_requires_gradient_sync(reduce)


def next_backward_is_last(model: Transformer, reduce: bool) -> None:
    """The next backward is the micro-batch's last.

    FSDP2 reduces a unit's gradients in one piece, of one type. Those that earlier backwards left it
    has in float32: the root's others join them once the last one, of tied embeddings, is complete.
    """
    for unit in fsdp_units(model):
        unit.set_requires_gradient_sync(reduce)
        unit.set_is_last_backward(reduce)

    def join(tied: Tensor) -> None:
        hook.remove()
        for gradient in (model.norm.weight.grad, tied.grad):
            if gradient is not None:
                gradient.data = gradient.to(accumulation_dtype(gradient.dtype))

    tied = model.args.tied_embeddings and model.output.weight.requires_grad
    if reduce and tied and fsdp_units(model):
        hook = model.output.weight.register_post_accumulate_grad_hook(join)


def end_backwards(model: Transformer) -> None:
    """The end of `begin_backwards`."""
    for unit in fsdp_units(model.output, model):
        unit.set_reshard_after_backward(True, recurse=False)
        unit.reshard()
