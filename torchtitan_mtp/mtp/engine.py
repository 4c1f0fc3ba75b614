"""The two ways to run n heads forward and backward; one result.

`joint` is ordinary autograd, for heads that read nothing of one another: all hidden states, one
loss, one backward. Their blocks are checkpointed (by `apply_activation_checkpointing`), so that a
head keeps one state [N, D] until its backward, not its activations, and gradients overwrite states.

`head_by_head` runs the heads' losses and backwards one after another, so that what a head needs for
its backward is gone before the next one's loss; each family does it in its file (`Heads.turns`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.profiler import record_function

from torchtitan_mtp.data.targets import Batch
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.heads import HeadsInput, TrunkOutput
from torchtitan_mtp.models.trunk import Trunk
from torchtitan_mtp.mtp.schedule import next_backward_is_last, reshard_again, unshard_beside
from torchtitan_mtp.ops import HeadByHeadLoss, LossOptions, LossOutput


def joint(
    model: Trunk,
    batch: Batch,
    head_scales: Tensor,
    options: LossOptions,
    reduce: bool = True,
) -> LossOutput:
    """Forward and backward of one micro-batch in one graph; gradients add to `.grad`.

    `reduce`: whether gradients are reduced over the ranks now.

    Error: the heads are a chain, whose states are needed after their losses.
    """
    if model.mtp is not None and not model.mtp.independent:
        raise UserError("joint: the heads are a chain; expected independent ones; use head_by_head")
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(reduce)
        model.set_is_last_backward(reduce)
    unshard_beside([*model.layers.values()][-1], model.output)
    out = _joint_loss(model, batch, model(batch), HeadByHeadLoss(head_scales, options))
    out.loss.backward()
    return out._replace(loss=out.loss.detach())


def _joint_loss(
    model: Trunk, batch: Batch, hiddens: list[Tensor], head_loss: HeadByHeadLoss
) -> LossOutput:
    """The loss of n hidden states [B, S, D]."""
    groups = [slice(0, None)]
    if head_loss.options.target_loss is not None:
        model.teach(head_loss, hiddens[0])
    if model.mtp is not None and model.mtp.detach_trunk:
        groups = [slice(0, 1), slice(1, None)]  # the others' must not train `output`
    outputs = []
    for heads in groups:
        compute = functools.partial(head_loss, first=heads.start)
        labels, detach = batch.labels[..., heads], heads.start > 0
        outputs.append(model.output.loss(hiddens[heads], labels, compute, detach))
    return _together(outputs)


def head_by_head(
    model: Trunk,
    batch: Batch,
    head_scales: Tensor,
    options: LossOptions,
    reduce: bool = True,
) -> LossOutput:
    """As `joint`, head by head."""
    if model.mtp is None:
        return joint(model, batch, head_scales, options, reduce)
    head_loss = HeadByHeadLoss(head_scales, options)
    for layer in model.trunk_layers()[-1:]:
        first = model.mtp.first_module(options.target_loss is not None)
        unshard_beside(layer, first, model.output)
    trunk = model.forward_trunk(batch)
    given = HeadsInput(model, batch, trunk, head_loss, reduce)
    losses, roots, gradients = model.mtp.turns(given)
    if roots:
        reshard_again(model.output)
        next_backward_is_last(model, reduce)
        with record_function("backward of the trunk"):
            torch.autograd.backward(roots, gradients)
    reshard_again(model.output, model)
    return _together([losses[k] for k in sorted(losses)])


def heads_backward(
    model: Trunk,
    batch: Batch,
    trunk: TrunkOutput,
    head_scales: Tensor,
    options: LossOptions,
    engine: str,
) -> tuple[LossOutput, list[Tensor], list[Tensor]]:
    """What an engine does on a trunk's output that is there already, whose backward is another's:
    losses, backwards of the heads, and the roots and gradients of `HeadsOutput`. Nothing is reduced
    over the ranks."""
    head_loss = HeadByHeadLoss(head_scales, options)
    if engine == "head_by_head" and model.mtp is not None:
        given = HeadsInput(model, batch, trunk, head_loss, reduce=False)
        losses, roots, gradients = model.mtp.turns(given)
        return _together([losses[k] for k in sorted(losses)]), roots, gradients
    leaf = trunk.state.detach().requires_grad_(trunk.state.requires_grad)
    own = trunk._replace(state=leaf)
    hiddens = [model.norm(leaf)] if model.mtp is None else model.mtp(own)
    out = _joint_loss(model, batch, hiddens, head_loss)
    out.loss.backward()
    out = out._replace(loss=out.loss.detach())
    return (out, [], []) if leaf.grad is None else (out, [trunk.state], [leaf.grad])


def backward_follows_forward(model: Trunk, engine: str) -> bool:
    """Whether each head's backward comes right after its forward: no two are alive at a time."""
    return engine == "head_by_head" and model.mtp is not None and model.mtp.independent


def _together(outputs: Sequence[LossOutput]) -> LossOutput:
    """Outputs of some heads each, in the heads' order -> one of all."""
    if len(outputs) == 1:
        return outputs[0]
    losses, *statistics = zip(*outputs, strict=True)
    return LossOutput(torch.stack(losses).sum(), *(torch.cat(parts) for parts in statistics))


Engine = Callable[[Trunk, Batch, Tensor, LossOptions, bool], LossOutput]

ENGINES: dict[str, Engine] = {"head_by_head": head_by_head, "joint": joint}
"""What runs forward and backward of a micro-batch, by the word of `mtp.engine`."""
