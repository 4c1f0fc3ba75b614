"""The parts of every family's schedule: a head's loss with its backward, and the control of FSDP2
over several backwards in one micro-batch.

At the end of every backward FSDP2 reduces gradients and reshards parameters. After one head's
backward that would be too early: the heads still to come need `output` and the root's own
parameters (the final norm's among them). `begin_no_sync` keeps these unsharded and every gradient
local until it is complete. So `output` is unsharded once and its gradient reduced once, whatever n
is.

And a block that runs outside of the root's forward, as heads do, is a root to FSDP2: it starts to
unshard when all computation before it is done, as after an optimizer's step. `unshard_beside` and
`unshard_ahead` start it earlier. On a model without FSDP2 all these functions do nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.profiler import record_function

from torchtitan_mtp.data.targets import Batch
from torchtitan_mtp.models.trunk import Trunk
from torchtitan_mtp.ops import HeadByHeadLoss, LossOutput, accumulation_dtype


def head_order(n: int, head_1_last: bool) -> list[int]:
    """The heads in the order in which their losses run."""
    extra = list(range(n, 1, -1))
    return [*extra, 1] if head_1_last else [1, *extra]


def loss_backward(
    model: Trunk, batch: Batch, head_loss: HeadByHeadLoss, k: int, hidden: Tensor, last: bool
) -> LossOutput:
    """Head k's loss and its backward; the gradient overwrites `hidden` [B, S, D]."""
    assert model.mtp is not None
    compute = functools.partial(head_loss, first=k - 1, last=last)
    detach = model.mtp.detach_trunk and k > 1
    with record_function(f"loss {k}"):  # ranges of a profile: they cost microseconds without one
        out = model.output.loss([hidden], batch.labels[..., k - 1 : k], compute, detach)
    if out.loss.requires_grad:
        with record_function(f"backward of head {k}"):
            out.loss.backward()
    return out._replace(loss=out.loss.detach())


def fsdp_units(*modules: object) -> list[FSDPModule]:
    """Those of the modules that are FSDP2 units; none without FSDP2."""
    return [module for module in modules if isinstance(module, FSDPModule)]


def block_units(*blocks: nn.Module | None) -> list[FSDPModule]:
    """The FSDP2 units of blocks: their own, and those within them (of experts that ranks share)."""
    return fsdp_units(*(part for block in blocks if block is not None for part in block.modules()))


def unshard_beside(block: nn.Module, *units: nn.Module | None) -> None:
    """Unshard what runs next while `block` runs forward, from now on."""
    for unit in fsdp_units(block):
        unit.set_modules_to_forward_prefetch(block_units(*units))


def unshard_ahead(unit: nn.Module | None) -> None:
    """Start to unshard what runs next; FSDP2 waits for it there."""
    for module in block_units(unit):
        module.unshard(async_op=True)


def begin_no_sync(model: Trunk, blocks: Iterable[nn.Module]) -> None:
    """Keep gradients local, as FSDP's `no_sync`: those of `blocks` and of what the heads share
    (`output`, the embedding, the root's own parameters). What of these is unsharded stays so.

    blocks: those that have run forward in this micro-batch; FSDP2 has no gradients to keep of
    others.
    """
    for unit in fsdp_units(model):
        unit.set_is_last_backward(False)
    shared = fsdp_units(model, model.tok_embeddings, model.output)
    for unit in (*shared, *block_units(*blocks)):
        unit.set_requires_gradient_sync(False, recurse=False)
        unit.set_reshard_after_backward(False, recurse=False)


def sync_in_next_backward(reduce: bool, *units: nn.Module | None) -> None:
    """Reduce the gradients of `units` after the next backward, which completes them, if `reduce`:
    whether this is the micro-batch that reduces.

    `output` stays unsharded even so: FSDP2 prefetches in the reverse order of the forwards, where
    another head's `output` comes before the last head's block, and would be unsharded once more.
    """
    for unit in fsdp_units(*units):
        unit.set_requires_gradient_sync(reduce)


def next_backward_is_last(model: Trunk, reduce: bool) -> None:
    """Tell FSDP2 that the next backward is the micro-batch's last.

    FSDP2 reduces all gradients of a unit together, in one dtype, and accumulates those of earlier
    backwards in float32. So, once the last one, of tied embeddings, is complete, the root's other
    gradients are cast to float32 too.
    """
    for unit in fsdp_units(model):
        unit.set_requires_gradient_sync(reduce)
        unit.set_is_last_backward(reduce)
    for unit in fsdp_units(model.tok_embeddings, *model.layers.values()):
        unit.set_reshard_after_backward(True)

    def cast(tied: Tensor) -> None:
        hook.remove()
        for gradient in (*(p.grad for p in model.norm.parameters()), tied.grad):
            if gradient is not None:
                gradient.data = gradient.to(accumulation_dtype(gradient.dtype))

    tied = model.args.tied_embeddings and model.output.weight.requires_grad
    if reduce and tied and fsdp_units(model):
        hook = model.output.weight.register_post_accumulate_grad_hook(cast)


def reshard_again(*modules: nn.Module) -> None:
    """Undo `begin_no_sync` for what no later head needs: `output` before the trunk's backward, in
    which it would stand beside the blocks; in the end the root."""
    for unit in fsdp_units(*modules):
        unit.set_reshard_after_backward(True, recurse=False)
        unit.reshard()
