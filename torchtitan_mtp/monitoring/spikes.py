"""Notice a loss that jumps."""

import logging
import math
from collections import deque
from collections.abc import Sequence
from statistics import median

logger = logging.getLogger(__name__)

_HISTORY = 32  # logged losses to compare with
_ENOUGH = 8
_DEVIATIONS = 6.0
_AT_LEAST = 0.2  # nats: smaller jumps are not worth a line, however quiet the run is


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
