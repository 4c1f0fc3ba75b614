"""Activation checkpointing of blocks: full, every k-th block, or by operation."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from torchtitan_mtp.config import ActivationCheckpoint
from torchtitan_mtp.models.trunk import Trunk
from torchtitan_mtp.mtp.engine import backward_follows_forward

# Worth keeping: attention, every second matrix product, which experts a token goes to, which is
# decided once, what ranks exchange for their experts, and the largest magnitudes that float8 scales
# by (of a tensor, of its rows): a number each, of which every one takes a pass over a tensor. The
# rest is cheap to compute again.
_KEPT = (
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch._higher_order_ops.flex_attention,
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops.aten.topk.default,
    torch.ops._c10d_functional.all_to_all_single.default,
    torch.ops.aten.max.default,
    torch.ops.aten.amax.default,
)
_PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.torchtitan_mtp.grouped_linear.default,
)


def _selective_contexts() -> Any:
    seen = {True: 0, False: 0}  # products so far, in the recomputation and in the forward

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = op in _KEPT
        if op in _PRODUCTS:
            seen[context.is_recompute] += 1
            keep = seen[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    forward, again = create_selective_checkpoint_contexts(policy)
    return forward, _Recompute(again)


class _Recompute(TorchDispatchMode):
    """torch's mode of a recomputation, for what may have been kept alone. It demands that the same
    operations run as in the forward; FSDP2's, where a block holds a unit, are not the same."""

    def __init__(self, mode: TorchDispatchMode) -> None:
        super().__init__()
        self.mode = mode

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _KEPT or func in _PRODUCTS:
            return self.mode.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


def apply_activation_checkpointing(
    model: Trunk, config: ActivationCheckpoint, engine: str = "head_by_head"
) -> None:
    """Make blocks recompute their activations in the backward, heads' included.

    `mode = "selective"` with `selective_ac_option = "op"` keeps attention, every second matrix
    product and what float8 scales by; with a number k, every k-th block is checkpointed whole.
    Parameter names stay.

    Heads that all run forward before the first backward are checkpointed whole in any mode: only so
    does memory not grow by their activations. (Of parallel heads under the `engine` "head_by_head",
    each one's backward follows its forward.)
    """
    held = model.mtp is not None and not backward_follows_forward(model, engine)
    option = config.selective_ac_option if config.mode == "selective" else "1"
    by_op = option == "op"
    for i, (name, block) in enumerate(model.named_blocks()):
        if held and name.startswith("mtp."):
            _checkpoint_block(block, False, config.early_stop)
        elif config.mode != "none" and (by_op or i % int(option) == 0):
            _checkpoint_block(block, by_op, config.early_stop)


def _checkpoint_block(block: nn.Module, by_op: bool, early_stop: bool) -> None:
    forward = block.forward
    # The forward has no randomness: there is no generator state to keep and restore.
    options = dict[str, Any](use_reentrant=False, preserve_rng_state=False, early_stop=early_stop)
    if by_op:
        options["context_fn"] = _selective_contexts

    @functools.wraps(forward)
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # decoding: nothing is kept, and caches must not run twice
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **options, **kwargs)

    block.forward = checkpointed
