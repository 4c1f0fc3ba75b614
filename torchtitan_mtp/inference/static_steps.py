"""Steps of a generation in few shapes: compiled once each, or recorded as a CUDA graph and launched
as a whole.

A small model's step is hundreds of kernels of microseconds, and launching each takes the host as
long. What makes steps alike: caches of a fixed length under a mask, positions on the device, heads
that run over a window padded to the most that a step adds, random numbers drawn beforehand. Then a
step reads nothing of the host but a few numbers of its kind (number of drafts, whether heads run,
keys attended to), and its tensors are always the same ones: a recorded step that is launched again
does what the next one is to do.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchtitan_mtp.errors import UserError
from torchtitan_mtp.inference.drafting import Plan
from torchtitan_mtp.inference.sampling import Noise
from torchtitan_mtp.transfer import to_device

logger = logging.getLogger(__name__)

MULTIPLE = 128  # of the length of caches: generations of about one length share what was compiled
FEWEST_KEYS = 1024  # that a step attends to; beyond them twice as many, and again

Launch = Callable[[], Tensor]


def room(length: int) -> int:
    """Positions of caches that hold `length`."""
    return -(-length // MULTIPLE) * MULTIPLE


def keys_for(length: int, most: int) -> int:
    """How many keys a step attends to that needs `length` of `most`."""
    keys = FEWEST_KEYS
    while keys < length:
        keys *= 2
    return min(keys, most)


def cuda_graph(device: torch.device) -> Callable[[Launch], Launch]:
    """What records a step on `device`. Error: it is no GPU."""
    if device.type != "cuda":
        raise UserError("cuda_graphs: they are of GPUs, and the model is on the CPU; leave it out")
    # One launch is read before the next, so that all graphs may work in the same memory.
    pool = torch.cuda.graph_pool_handle()

    def record(step: Launch) -> Launch:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = step()

        def launch() -> Tensor:
            graph.replay()
            return result

        return launch

    return record


class StaticSteps:
    """Runs `step(plan)` for plans whose heads run over no more than `window` positions.

    most: keys that there are. record: of `cuda_graph`; None leaves it at static shapes. The first
    step of a kind runs as it is (and compiles), the second is recorded. Error in that: a warning,
    and no more is recorded.
    """

    def __init__(
        self,
        step: Callable[[Plan], Tensor],
        batch: int,
        window: int,
        most: int,
        device: torch.device,
        record: Callable[[Launch], Launch] | None,
    ) -> None:
        self.step, self.window, self.most, self.record = step, window, most, record
        self.last = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.noise: dict[int, Noise] = {}  # by the number of drafts
        self.launches: dict[Any, Launch | None] = {}  # by kind of step; None: it ran once

    def run(self, plan: Plan) -> Tensor:
        """As `step`, whose result holds until the next one."""
        needed = max(plan.last) + 2 + plan.drafts
        plan = plan._replace(
            last=self._last_in_place(plan.last),
            noise=self._noise_in_place(plan),
            window=self.window if plan.window else 0,
            keys=keys_for(needed, self.most),
        )
        kind = plan.drafts, plan.window, plan.keys
        if self.record is not None and kind in self.launches:
            launch = self.launches[kind] or self._recorded(plan)
            self.launches[kind] = launch
            return launch()
        self.launches[kind] = None
        return self.step(plan)

    def _recorded(self, plan: Plan) -> Launch:
        step = functools.partial(self.step, plan)
        assert self.record is not None
        try:
            return self.record(step)
        except RuntimeError as error:
            self.record = None
            reason = str(error).partition("\n")[0]
            logger.warning("no CUDA graph of a step: %s; decoding goes on without", reason)
            return step

    def _last_in_place(self, last: Any) -> Tensor:
        return self.last.copy_(to_device(torch.tensor(last), self.last.device).unsqueeze(1))

    def _noise_in_place(self, plan: Plan) -> Noise | None:
        """The step's random numbers, where those of the first such step were."""
        if plan.noise is None or self.record is None:
            return plan.noise
        kept = self.noise.setdefault(plan.drafts, plan.noise)
        if kept is not plan.noise:
            for old, new in zip(kept, plan.noise, strict=True):
                old.copy_(new)
        return kept
