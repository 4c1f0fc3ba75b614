"""The heads' losses of a step over micro-batches and ranks, and what is odd in them."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan_mtp.data.targets import PADDING, Batch
from torchtitan_mtp.distributed.mesh import all_reduce
from torchtitan_mtp.transfer import send_to_host

logger = logging.getLogger(__name__)

_HISTORY = 32  # logged losses to compare with
_ENOUGH = 8
_DEVIATIONS = 6.0
_AT_LEAST = 0.2  # nats: smaller jumps are not worth a line, however quiet the run is


@dataclass(frozen=True)
class HeadLosses:
    """What n heads make of a text, over all ranks; lists run from head 1 to head n.

    losses: cross-entropy, nats a token. accuracies: share of targets that are the head's most
    likely token. targets: their number. total: the weighted sum that is minimised. max_loss: head
    1's loss on the rank where it is largest. Means are nan without a target.
    """

    losses: list[float]
    accuracies: list[float]
    targets: list[int]
    total: float
    max_loss: float


class StepLosses:
    """Sums over the micro-batches of a step on this rank, kept on the device.

    group: the ranks over which they are reduced (`World.losses`)."""

    def __init__(
        self, n: int, device: torch.device, group: dist.ProcessGroup | None = None
    ) -> None:
        self.group = group
        self.sums = torch.zeros(3, n, dtype=torch.float64, device=device)  # loss, correct, valid
        self.total = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, loss: Tensor, loss_sum: Tensor, valid: Tensor, correct: Tensor) -> None:
        """Add one micro-batch's `LossOutput`."""
        self.total += loss.detach()
        self.sums += torch.stack((loss_sum.double(), correct.double(), valid.double()))

    def reduce(self) -> HeadLosses:
        """The means over the ranks."""
        return self.send()()

    def send(self) -> Callable[[], HeadLosses]:
        """`reduce`, under way to the host: the result waits for it."""
        own, group = self.sums[0, 0] / self.sums[2, 0], self.group
        own = own.where(self.sums[2, 0] > 0, -torch.inf)
        max_loss = all_reduce(own, dist.ReduceOp.MAX, group)
        loss_sum, correct, valid = all_reduce(self.sums.clone(), group=group)
        total = all_reduce(self.total, group=group).where(valid.any(), torch.nan)
        # A maximum loses a nan on the way, a sum does not.
        max_loss = max_loss.where((valid[0] > 0) & ~loss_sum[0].isnan(), torch.nan)
        means = (loss_sum / valid, correct / valid, valid)
        arrive = send_to_host(torch.cat((*means, torch.stack((total, max_loss)))))

        def read() -> HeadLosses:
            numbers, n = arrive(), len(valid)
            targets = [int(count) for count in numbers[2 * n : 3 * n]]
            return HeadLosses(numbers[:n], numbers[n : 2 * n], targets, *numbers[3 * n :])

        return read


class MissingTargets:
    """Says once of each head that it had not a single target, and why."""

    def __init__(self) -> None:
        self._said: set[int] = set()

    def check(self, where: str, targets: Sequence[float], batches: Sequence[Batch]) -> None:
        """targets: how many heads 1..n had, over all ranks. batches: some of rank 0's."""
        new = [k for k, count in enumerate(targets, 1) if not count and k not in self._said]
        self._said.update(new)
        if new and dist.get_rank() == 0:
            heads = f"head {new[0]}" if any(targets) else "any head"
            logger.warning("%s: no target of %s: %s", where, heads, _cause(batches, new[0]))


def _cause(batches: Sequence[Batch], k: int) -> str:
    docs = [batch.doc_ids for batch in batches]  # [B, S]
    if any(((doc[:, k:] == doc[:, :-k]) & (doc[:, k:] != PADDING)).any() for doc in docs):
        return "all that it could predict is prompt, which is no target"
    return f"no document here has more than {k} tokens"


class LossSpikes:
    """Warns when head 1's loss is far above what was logged lately.

    Far is 6 standard deviations above the median, where the deviation is estimated from the median
    distance to the median (times 1.4826), so that earlier spikes do not hide later ones.
    """

    def __init__(self) -> None:
        self._losses: deque[list[float]] = deque(maxlen=_HISTORY)

    def check(self, step: int, head_losses: Sequence[float], grad_norm: float) -> bool:
        """Look at the losses of heads 1..n (nats) of a logged step; whether they are a spike."""
        if not math.isfinite(head_losses[0]):
            return False  # said elsewhere
        before, found = [losses[0] for losses in self._losses], False
        if len(before) >= _ENOUGH:
            middle = median(before)
            deviation = 1.4826 * median(abs(loss - middle) for loss in before)
            found = head_losses[0] > middle + max(_DEVIATIONS * deviation, _AT_LEAST)
        if found:
            usual = [median(column) for column in zip(*self._losses, strict=True)]
            changes = ", ".join(
                f"head {k} {now:.3f} ({now - then:+.3f})"
                for k, (now, then) in enumerate(zip(head_losses, usual, strict=True), 1)
                if math.isfinite(now - then)
            )
            logger.warning(
                "step %d: loss spike against the median of the last %d logged steps: %s; gradient "
                "norm %.3g",
                *(step, len(before), changes, grad_norm),
            )
        self._losses.append(list(head_losses))
        return found
