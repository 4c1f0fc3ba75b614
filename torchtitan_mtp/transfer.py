"""Copies between the host and a GPU for which the host does not wait.

To and from pageable memory a copy is staged, and the host waits for it, and so for all that was
asked of the GPU before. Pinned memory is read and written while both go on; torch keeps it until
the copy is done, and hands it out again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`; itself where that is the CPU."""
    if device.type in ("cpu", "meta"):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def send_to_host(values: Tensor) -> Callable[[], list[float]]:
    """Start a copy of values [m]; the result waits for it, not at all on a CPU, and returns it."""
    host = values.to("cpu", non_blocking=True)  # of a GPU's values: to pinned memory
    sent = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None

    def arrive() -> list[float]:
        if sent:
            sent.synchronize()
        return host.numpy().tolist()

    return arrive
