"""Garbage collection at chosen steps, so that all ranks stop for it together.

Python collects when one process has allocated enough, at a different moment on every rank; each
such pause holds up every collective. So automatic collection is off during training.
"""

import gc

import torch


class GarbageCollection:
    """Collects every `gc_freq` steps; with `debug` fully at every step.

    `debug` on CUDA also reports reference cycles that hold its memory.
    """

    def __init__(self, gc_freq: int, *, debug: bool = False, rank: int = 0) -> None:
        self.gc_freq, self.debug = gc_freq, debug
        gc.disable()
        gc.collect(1)
        if debug and rank == 0 and torch.cuda.is_available():  # it reads CUDA's allocator
            from torch.utils.viz._cycles import warn_tensor_cycles

            warn_tensor_cycles()

    def run(self, step: int) -> None:
        """Called once a step."""
        if self.debug:
            gc.collect(2)
        elif step > 1 and step % self.gc_freq == 0:
            gc.collect(1)

    def close(self) -> None:
        """Give collection back to Python."""
        gc.enable()
