"""Numbers that are not finite: kept out of the weights, traced to the batch they came from."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan_mtp.checkpoint.state import is_finite
from torchtitan_mtp.data.targets import PADDING, Batch
from torchtitan_mtp.distributed.balance import apart_from_training
from torchtitan_mtp.distributed.mesh import all_reduce
from torchtitan_mtp.distributed.ranks import Ranks
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.trunk import Trunk
from torchtitan_mtp.monitoring.losses import MissingTargets
from torchtitan_mtp.ops import LossOptions, linear_cross_entropy
from torchtitan_mtp.transfer import send_to_host

logger = logging.getLogger(__name__)


@dataclass
class FiniteGuard:
    """Leaves out, on all ranks, an update whose loss or gradient norm is not finite on one of them,
    and one for which no head has a target: decay and moments alone would move the weights.

    The verdict of a step is a tensor. A fused optimizer takes it as `found_inf` and skips the
    update on the device, weights, moments and step count, so the host need not wait for it: it
    reads a step's verdict while the device computes the next step, before that one's update, or
    earlier where something is logged or saved (`settle`). The other implementations of the
    optimizer wait at every step.

    allowed: updates in a row that may be skipped; one more stops the run. counts: its `skipped`,
    over the whole run, goes up by one with each. find_cause: from a step's micro-batches to where
    in them it began, for the message; called by all ranks together.
    """

    optimizer: torch.optim.Optimizer
    allowed: int
    counts: Any
    find_cause: Callable[[Sequence[Batch]], str]
    _in_a_row: int = 0
    _missing: MissingTargets = field(default_factory=MissingTargets)
    _pending: Callable[[], bool] | None = None  # reads the verdict that is under way

    def admits(
        self, step: int, loss: Tensor, norm: Tensor, targets: list[float], batches: Sequence[Batch]
    ) -> bool:
        """Whether to call `optimizer.step()` now: unless this step is known to be left out.

        loss, norm: scalars, this rank's loss and the gradient's norm over all ranks. targets: how
        many heads 1..n have over all ranks. batches: the micro-batches of this rank, on the CPU.

        Raises:
            UserError: as `settle`.
        """
        self.settle()
        norm = norm.to(loss.device, non_blocking=True)
        bad = (~(loss.isfinite() & norm.isfinite())).float()
        bad = all_reduce(bad, dist.ReduceOp.MAX)
        arrive = send_to_host(torch.stack((bad, norm.float())))
        self._pending = lambda: self._judge(step, arrive(), targets, batches)
        group = self.optimizer.param_groups[0]
        # Offloaded parameters are updated on the CPU, which has to have the verdict by then.
        if group.get("fused") and group["params"][0].device.type == loss.device.type:
            self.optimizer.found_inf = bad  # type: ignore[attr-defined]
            return any(targets)
        return self.settle()

    def settle(self) -> bool:
        """Read the verdict that is under way, if any; whether it was for the update.

        Raises:
            UserError: on every rank: more than `allowed` bad steps in a row.
        """
        pending, self._pending = self._pending, None
        return pending is None or pending()

    def _judge(
        self, step: int, verdict: list[float], targets: list[float], batches: Sequence[Batch]
    ) -> bool:
        bad, norm = verdict
        if not bad:
            self._in_a_row, some = 0, any(targets)
            what = f"step {step}{'' if some else ' updates nothing'}"
            self._missing.check(what, targets, batches)
            return some
        self._in_a_row += 1
        what = f"step {step}: loss or gradient not finite (norm {norm}): {self.find_cause(batches)}"
        if self._in_a_row > self.allowed:
            raise UserError(
                f"{what}; stopped before the update, with nothing saved of it: resume from the "
                "last checkpoint with a lower optimizer.lr or without that data, or allow updates "
                f"to be skipped (training.skip_nonfinite = {self.allowed})"
            )
        self.counts.skipped += 1
        logger.warning(
            "%s; update skipped, %d in a row, %d in all", what, self._in_a_row, self.counts.skipped
        )
        return False


def find_cause(
    parts: Sequence[Trunk],
    forward: Callable[[Batch], list[Tensor] | None],
    options: LossOptions,
    device: torch.device,
    batches: Sequence[Batch],
) -> str:
    """The first rank, head and place whose hidden state or loss is not finite, by a forward anew.

    parts: of the model, those that this rank has, the end of it last. forward: as in
    `evaluate_batches`. The update was skipped, so the weights are still those that the step was
    computed with. All ranks call it together.
    """
    found, compute = "", functools.partial(linear_cross_entropy, options=options)
    with apart_from_training(*parts):
        for i, batch in enumerate(batches):
            batch = batch.to(device)
            for k, hidden in enumerate(forward(batch) or ()):  # [B, S, D], or a piece of S
                states = parts[-1].output.gather(hidden)  # [B, S, D]
                for row in range(len(hidden)):
                    place = f"head {k + 1}, micro-batch {i + 1}, sequence {row + 1}"
                    one = slice(row, row + 1)
                    # Every rank calls `output` as often as the others: its weight is gathered anew.
                    labels = batch.labels[one, :, k : k + 1]
                    out = parts[-1].output.loss([hidden[one]], labels, compute)
                    # Not where in the sequence: attention kernels multiply what is masked by zero,
                    # and so spread what is not finite over earlier positions.
                    real = batch.doc_ids[row] != PADDING  # [S]
                    if not found and not states[row][real].isfinite().all():
                        found = f"{place}: hidden state not finite"
                    elif not found and not out.loss_sum.isfinite().all():
                        found = f"{place}: loss {out.loss_sum.item()}"
    named = (named for part in parts for named in part.named_parameters())
    name = next((name for name, p in named if not is_finite(p)), "")
    everyone = Ranks().gather((found, name))
    weight = next((f"; {name} itself is not finite" for _, name in everyone if name), "")
    for rank, (found, _) in enumerate(everyone):
        if found:
            return f"it began on rank {rank} with {found}{weight}"
    return f"all losses are finite when computed anew, so it was the backward{weight}"
