"""Other people's linear cross-entropies, rewritten in a few lines to stand beside ours.

Each takes (hiddens: n tensors [N, D], weight [V, D], labels [N, n]) and leaves the gradients of the
summed loss in `.grad`; labels are all valid.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torchtitan_mtp.ops import linear_cross_entropy
from torchtitan_mtp.ops.soft_targets import TARGET_LOSSES

CHUNKS = 8  # default of TorchTitan (0.3.0) and torchtune


def _cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


def _ours(**options: Any) -> Callable[..., None]:
    def run(hiddens: Sequence[Tensor], weight: Tensor, labels: Tensor) -> None:
        linear_cross_entropy(hiddens, weight, labels, **options).loss.backward()

    return run


def _torchs(chunk_rows: int | None = None) -> Callable[..., None]:
    """torch.nn.functional.linear_cross_entropy (torch 2.13 on); None: the chunk that it chooses."""

    def run(hiddens: Sequence[Tensor], weight: Tensor, labels: Tensor) -> None:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_rows)
        losses = [
            F.linear_cross_entropy(h, weight, labels[:, k], reduction="sum", options=options)
            for k, h in enumerate(hiddens)
        ]
        torch.stack(losses).sum().backward()

    return run


def naive(hiddens: Sequence[Tensor], weight: Tensor, labels: Tensor) -> None:
    """Whole logits, with the count of labels above every other."""
    losses = [_counted_cross_entropy(h, weight, labels[:, k]) for k, h in enumerate(hiddens)]
    torch.stack(losses).sum().backward()


def _counted_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float()
    y, x = labels.unsqueeze(1), logits.detach()
    (x.gather(1, y) > x.scatter(1, y, -torch.inf).amax(1, keepdim=True)).sum()
    return F.cross_entropy(logits, labels, reduction="sum")


def _distilled(kind: str, passes: str = "eager") -> Callable[..., None]:
    """Every head against a teacher's logits, which are another product: 8 N D V FLOPs a head."""

    def run(hiddens: Sequence[Tensor], weight: Tensor, labels: Tensor) -> None:
        options = {"target_loss": kind, "passes": passes, "first": 1}
        teacher = hiddens[0].detach().flip(0)
        linear_cross_entropy(hiddens, weight, labels, teacher=teacher, **options).loss.backward()

    return run


def titan_chunked(hiddens: Sequence[Tensor], weight: Tensor, labels: Tensor) -> None:
    """TorchTitan's ChunkedLossWrapper, for one prediction: each chunk's backward at once.

    The weight gradient goes to `.grad`. For several predictions it takes a chunk of all of them at
    a time, n times these logits.
    """
    for k, hidden in enumerate(hiddens):
        detached = hidden.detach()
        grad = torch.empty_like(detached)
        for h, y, g in zip(
            detached.chunk(CHUNKS), labels[:, k].chunk(CHUNKS), grad.chunk(CHUNKS), strict=True
        ):
            h = h.requires_grad_()
            _cross_entropy(h, weight, y).backward()
            assert h.grad is not None
            g.copy_(h.grad)
        hidden.backward(grad)


def torchtune_chunked(hiddens: Sequence[Tensor], weight: Tensor, labels: Tensor) -> None:
    """torchtune's LinearCrossEntropyLoss: chunks under one autograd graph."""
    losses = [
        _cross_entropy(h, weight, y)
        for k, hidden in enumerate(hiddens)
        for h, y in zip(hidden.chunk(CHUNKS), labels[:, k].chunk(CHUNKS), strict=True)
    ]
    torch.stack(losses).sum().backward()


def checkpointed(hiddens: Sequence[Tensor], weight: Tensor, labels: Tensor) -> None:
    """Activation checkpointing around 512-row chunks: logits computed twice."""
    losses = [
        checkpoint(_cross_entropy, h, weight, y, use_reentrant=False)
        for k, hidden in enumerate(hiddens)
        for h, y in zip(hidden.split(512), labels[:, k].split(512), strict=True)
    ]
    torch.stack(losses).sum().backward()


def naive_compiled(hiddens: Sequence[Tensor], weight: Tensor, labels: Tensor) -> None:
    """Whole logits, pointwise part fused by torch.compile."""
    compiled = torch.compile(_cross_entropy)  # compiles once: the code of one function is cached
    losses = [compiled(h, weight, labels[:, k]) for k, h in enumerate(hiddens)]
    torch.stack(losses).sum().backward()


@torch.compiler.disable  # Liger is silently wrong under torch.compile with ignored labels
def liger(hiddens: Sequence[Tensor], weight: Tensor, labels: Tensor) -> None:
    """Liger-Kernel's fused linear cross-entropy (Triton), accumulating in float32."""
    module = importlib.import_module("liger_kernel.transformers")
    loss_of = module.LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
    losses = [loss_of(weight, h, labels[:, k].contiguous()) for k, h in enumerate(hiddens)]
    torch.stack(losses).sum().backward()


@torch.compiler.disable
def cce(hiddens: Sequence[Tensor], weight: Tensor, labels: Tensor) -> None:
    """Apple's cut cross-entropy (Triton), exact: no gradient is filtered out."""
    loss_of = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    losses = [
        loss_of(h, weight, labels[:, k].contiguous(), reduction="sum", filter_eps=None)
        for k, h in enumerate(hiddens)
    ]
    torch.stack(losses).sum().backward()


PEERS: dict[str, Callable[[Sequence[Tensor], Tensor, Tensor], None]] = {
    "chunked": _ours(),
    "chunked_compiled": _ours(passes="compiled"),
    "chunked_compiled_bf16": _ours(passes="compiled", bf16_logits=True),
    "chunked_triton": _ours(passes="triton"),
    "chunked_triton_bf16": _ours(passes="triton", bf16_logits=True),
    **{f"distilled_{kind}": _distilled(kind) for kind in TARGET_LOSSES},
    "distilled_kl_compiled": _distilled("kl", "compiled"),
    "distilled_kl_triton": _distilled("kl", "triton"),
    "torch": _torchs(),
    "torch_512": _torchs(512),
    "titan_chunked": titan_chunked,
    "torchtune_chunked": torchtune_chunked,
    "checkpointed": checkpointed,
    "naive_compiled": naive_compiled,
    "naive": naive,
    "liger": liger,
    "cce": cce,
}
