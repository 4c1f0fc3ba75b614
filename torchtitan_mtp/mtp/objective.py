"""The weights of the heads' losses: scale, reduction, schedule, curriculum, normalisation.

    total = CE_1 + scale(step) * reduce_{k>=2} weight_k * CE_k,    CE_k = loss_sum_k / valid_k

with reduce = sum (Gloeckle et al. 2024, equation 2) or mean (DeepSeek-V3, equation 25), and
valid_k the number of head k's targets over all ranks and micro-batches of the step. weight_k is 1,
`mtp.loss_weights`, or of a geometric series whose mean over the active heads is 1
(`mtp.loss_decay`), so that their mean is FastMTP's loss (arXiv 2509.18362).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchtitan_mtp.config import MTP
from torchtitan_mtp.models.trunk import Trunk
from torchtitan_mtp.transfer import to_device


def loss_scale(mtp: MTP, step: int, steps: int) -> float:
    """The weight of heads 2..n together at `step` (1-based) of `steps`."""
    start, end = mtp.loss_scale, mtp.loss_scale_final
    if mtp.loss_scale_schedule == "linear":
        return start + (end - start) * (step - 1) / max(steps - 1, 1)
    if mtp.loss_scale_schedule == "step":  # DeepSeek-V3, section 4.2: 0.3, then 0.1
        return start if step <= mtp.loss_scale_boundary * steps else end
    return start


def num_active_heads(mtp: MTP, step: int, steps: int) -> int:
    """How many of the n heads count at `step` (1-based): arXiv 2505.22757, section 3.

    The first `curriculum_fraction` of the run is n equal stages; forward adds a head with each,
    reverse takes one away.
    """
    n = mtp.num_future_tokens
    if mtp.curriculum == "none":
        return n
    stage = min(n, 1 + int(n * (step - 1) / max(1.0, mtp.curriculum_fraction * steps)))
    return stage if mtp.curriculum == "forward" else n + 1 - stage


def head_weights(mtp: MTP, step: int, steps: int) -> list[float]:
    """Weights of CE_1..CE_n in the total at `step` (1-based) of `steps`."""
    n, active = mtp.num_future_tokens, num_active_heads(mtp, step, steps)
    weights = list(mtp.loss_weights) or [mtp.loss_decay**j for j in range(n - 1)]
    scale = loss_scale(mtp, step, steps)
    if active > 1 and not mtp.loss_weights:
        scale *= (active - 1) / sum(weights[: active - 1])
    if active > 1 and mtp.loss_reduction == "mean":
        scale /= active - 1
    return [1.0] + [scale * w if k <= active else 0.0 for k, w in enumerate(weights, start=2)]


def head_scales(weights: list[float], valid: Tensor) -> Tensor:
    """Factors of the loss sums [n] float32: weight_k / valid_k, and 0 for a head without targets.

    Args:
        valid: int64 [n], global counts, on any device.
    """
    weight = to_device(torch.tensor(weights, dtype=torch.float64), valid.device)
    return torch.where(valid > 0, weight / valid.clamp(min=1), 0.0).float()


def clear_unused_gradients(
    model: Trunk, weights: Sequence[float], targets: Sequence[float]
) -> list[str]:
    """Set the gradients to None of head modules that no weighted loss used in this step (they are
    zero), and return the modules' names. The optimizer then skips them: no weight decay, no step
    from moments of earlier steps.

    Call it after clipping, which sums over all gradients.

    Args:
        weights: of CE_1..CE_n in this step.
        targets: how many each has.
    """
    heads = [] if model.mtp is None else list(model.mtp.heads)
    weighted = [k for k in range(2, len(weights) + 1) if weights[k - 1] and targets[k - 1]]
    used = {module for k in weighted if model.mtp for module in model.mtp.modules_used_by(k)}
    unused = {f"mtp.heads.{j}": head for j, head in enumerate(heads) if head not in used}
    for head in unused.values():
        head.zero_grad(set_to_none=True)
    return list(unused)
