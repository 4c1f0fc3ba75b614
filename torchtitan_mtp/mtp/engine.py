"""The two ways to run n heads forward and backward; one result.

`joint` is ordinary autograd, with any backend of the loss: all hidden states, one loss, one
backward. Its heads' blocks are checkpointed (by `apply_activation_checkpointing`), so that a
head keeps one state [N, D] until its backward, not its activations; independent heads' gradients
overwrite their states.

`head_by_head` runs the heads' losses and backwards one after another, so that what a head needs for
its backward is gone before the next one's loss; each family does it in its file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from torchtitan_mtp.data.targets import Batch
from torchtitan_mtp.models.trunk import Trunk
from torchtitan_mtp.mtp.schedule import end_no_sync
from torchtitan_mtp.ops import HeadByHeadLoss, LossOptions, LossOutput, linear_cross_entropy


def forward_loss(
    model: Trunk,
    batch: Batch,
    head_scales: Tensor,
    options: LossOptions,
    head_loss: HeadByHeadLoss | None = None,
) -> LossOutput:
    """The loss of all heads, with its graph where gradients are on.

    head_loss: what computes it in place of `linear_cross_entropy`, for one backward of independent
    heads; gradients overwrite states. Without gradients under FSDP2, call `reshard()` on
    the FSDP modules afterwards: nothing else frees what a forward gathered.
    """
    hiddens, groups = model(batch), [slice(0, None)]
    if model.mtp is not None and model.mtp.detach_trunk:
        groups = [slice(0, 1), slice(1, None)]  # the others' must not train `output`
    teacher = None
    if options.target_loss is not None:
        teacher = hiddens[0].detach().flatten(0, 1)
        if head_loss is not None:
            head_loss.teach(teacher)
    outputs = []
    for heads in groups:
        compute = functools.partial(
            linear_cross_entropy,
            head_scales=head_scales[heads],
            options=options,
            teacher=teacher,
            first=heads.start,
        )
        if head_loss is not None:
            compute = functools.partial(head_loss, first=heads.start)
        labels, detach = batch.labels[..., heads], heads.start > 0
        outputs.append(model.output.loss(hiddens[heads], labels, compute, detach))
    return _together(outputs)


def joint(
    model: Trunk,
    batch: Batch,
    head_scales: Tensor,
    options: LossOptions,
    last_micro_batch: bool = True,
) -> LossOutput:
    """Forward and backward of one micro-batch in one graph; gradients add to `.grad`.

    `last_micro_batch`: whether gradients are reduced over the ranks now.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last_micro_batch)
        model.set_is_last_backward(last_micro_batch)
    in_place = options.backend == "chunked" and (model.mtp is None or model.mtp.independent)
    head_loss = HeadByHeadLoss(head_scales, options) if in_place else None
    out = forward_loss(model, batch, head_scales, options, head_loss)
    out.loss.backward()
    return out._replace(loss=out.loss.detach())


def head_by_head(
    model: Trunk,
    batch: Batch,
    head_scales: Tensor,
    options: LossOptions,
    last_micro_batch: bool = True,
) -> LossOutput:
    """As `joint`, head by head."""
    if model.mtp is None:
        return joint(model, batch, head_scales, options, last_micro_batch)
    head_loss = HeadByHeadLoss(head_scales, options)
    outputs = model.mtp.head_by_head(model, batch, head_loss, last_micro_batch)
    end_no_sync(model)
    return _together([outputs[k] for k in sorted(outputs)])


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
