"""The optimizer and its warmup-stable-decay schedule."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from torchtitan_mtp.config import LRScheduler, Optimizer

logger = logging.getLogger(__name__)


def build_optimizer(parameters: Iterable[nn.Parameter], config: Optimizer) -> torch.optim.Optimizer:
    """Adam or AdamW over the parameters that train, in a group for each mesh that some lie on."""
    by_mesh = _by_mesh(p for p in parameters if p.requires_grad)
    return getattr(torch.optim, config.name)(
        [{"params": group} for group in by_mesh.values()],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=config.implementation == "fused",
        foreach=config.implementation == "foreach",
    )


def lr_factor(config: LRScheduler, steps: int, step: int) -> float:
    """Learning rate at `step` (0-based) of `steps`, as a fraction of `optimizer.lr`.

    Linear warmup, a plateau, then decay to `min_lr_factor` over the last `decay_ratio` of the run;
    without a ratio the decay begins where the warmup ends. As TorchTitan's: the decay aims at one
    step past the end, so that the last step still learns.
    """
    warmup = min(config.warmup_steps, steps)
    ratio = 1.0 if config.decay_ratio is None else config.decay_ratio
    decay = min(round(steps * ratio), steps - warmup)
    decay_start = steps + 1 - decay
    if step < warmup:
        return (step + 1) / warmup
    if step < decay_start or decay == 0:
        return 1.0
    progress = min((step + 1 - decay_start) / decay, 1.0)
    shape = {
        "linear": 1 - progress,
        "sqrt": 1 - math.sqrt(progress),
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[config.decay_type]
    return config.min_lr_factor + (1 - config.min_lr_factor) * shape


class Schedule(LambdaLR):
    """Step it once after every optimizer step. Its state is the count of steps; the rule and the
    rates are always the present configuration's."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from its step, by the present rule."""
        self.last_epoch, self._step_count = state_dict["last_epoch"] - 1, state_dict["last_epoch"]
        self.step()


def build_scheduler(optimizer: torch.optim.Optimizer, config: LRScheduler, steps: int) -> Schedule:
    """The schedule of [lr_scheduler] over `steps` steps."""
    if config.warmup_steps > steps:
        what = "lr_scheduler.warmup_steps = %d exceeds training.steps = %d: the run is all warmup"
        logger.warning(what, config.warmup_steps, steps)
    schedule = Schedule(optimizer, lambda step: lr_factor(config, steps, step))
    optimizer._opt_called = True  # type: ignore[attr-defined]
    return schedule  # it would warn after a first step without a target, or update


def clip_gradients(
    model: nn.Module,
    max_norm: float,
    stages: dist.ProcessGroup | None = None,
    copied: nn.Parameter | None = None,
) -> Tensor:
    """Scale all gradients so that their global norm is at most `max_norm`; the norm before.

    stages: the ranks that have the rest of the model, if any. copied: a parameter that another of
    them has too, and counts.
    """
    by_mesh = _by_mesh(p for p in model.parameters() if p.grad is not None)
    norms = []
    for group in by_mesh.values():
        own = [p.grad for p in group if p.grad is not None and p is not copied]
        norm = torch.nn.utils.get_total_norm(own, foreach=True)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if len(norms) != 1:
        norms = [torch.linalg.vector_norm(torch.stack(norms or [torch.zeros(())]))]
    (norm,) = norms
    if stages is not None:
        squares = norm.to(next(model.parameters()).device).double() ** 2
        dist.all_reduce(squares, group=stages)
        norm = squares.sqrt().to(norm.dtype)
    for group in by_mesh.values():
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm, foreach=True)
    return norm


def _by_mesh(parameters: Iterable[nn.Parameter]) -> dict[DeviceMesh | None, list[nn.Parameter]]:
    """Parameters by their mesh: one call of a fused or foreach kernel takes those of one mesh."""
    found: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for param in parameters:
        mesh = param.device_mesh if isinstance(param, DTensor) else None
        found.setdefault(mesh, []).append(param)
    return found
