"""FSDP2 under an engine whose heads run backward one after another.

FSDP2 ends every backward by reducing and resharding what is unsharded. The engine's many backwards
have to look like one, or they would take `output` and the root's own parameters (the final norm's
among them) from under the heads whose turn is still to come. `hold` keeps these gathered, and every
gradient local until it is complete: so `output` is gathered once and its gradient reduced once,
whatever n is.

Everything here does nothing to a model without FSDP2.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from torchtitan_mtp.models.transformer import Transformer
from torchtitan_mtp.ops.chunked import accumulation_dtype


def hold(model: Transformer, blocks: Iterable[nn.Module]) -> None:
    """From now on no gradient of `blocks` and of what the heads share (`output`, the embedding, the
    root's own parameters) is reduced, and what they share stays gathered.

    blocks: those whose parameters a forward has gathered before: FSDP2 can't be told to keep the
    gradients of any other.
    """
    if not isinstance(model, FSDPModule):
        return
    model.set_is_last_backward(False)
    for part in (model, model.tok_embeddings, model.output, *blocks):
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(False, recurse=False)
    for unit in _shared(model):
        unit.set_reshard_after_backward(False, recurse=False)


def stay_gathered(units: Iterable[nn.Module], stay: bool) -> None:
    """Whether the units keep their gathered parameters at the end of a backward.

    A unit that FSDP2 has prefetched for the next turn would be freed before it.
    """
    for unit in units:
        if isinstance(unit, FSDPModule):
            unit.set_reshard_after_backward(not stay)


def reduce_after_next_backward(units: Iterable[nn.Module], reduce: bool) -> None:
    """The units' gradients are complete with the next backward. `reduce`: whether this micro-batch
    reduces any.

    `output` stays gathered all the same: FSDP2 prefetches in the reverse of the forwards' order,
    and before the last head's block comes another head's `output`, which would be gathered once
    more.
    """
    for unit in units:
        if isinstance(unit, FSDPModule):
            unit.set_requires_gradient_sync(reduce)


def finish_with_next_backward(model: Transformer, reduce: bool) -> None:
    """The next backward is the step's last.

    FSDP2 reduces a unit's gradients in one piece, of one type. Those that earlier turns left it has
    in float32: the root's others join them once the last one, of tied embeddings, is complete.
    """
    if not isinstance(model, FSDPModule):
        return
    model.set_requires_gradient_sync(reduce)
    model.set_is_last_backward(reduce)

    def join(tied: Tensor) -> None:
        hook.remove()
        for gradient in (model.norm.weight.grad, tied.grad):
            if gradient is not None:
                gradient.data = gradient.to(accumulation_dtype(gradient.dtype))

    if reduce and model.args.tied_embeddings and model.output.weight.requires_grad:
        hook = model.output.weight.register_post_accumulate_grad_hook(join)


def release(model: Transformer) -> None:
    """The end of `hold`."""
    for unit in _shared(model):
        unit.set_reshard_after_backward(True, recurse=False)
        unit.reshard()


def _shared(model: Transformer) -> list[FSDPModule]:
    return [unit for unit in (model.output, model) if isinstance(unit, FSDPModule)]
