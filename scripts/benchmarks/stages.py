"""A pipeline's step, from ranks of its stages: the fullest one's memory, the slowest one's time.

Ranks are run that differ: of the first stage, whose micro-batches in flight are most; of the
second, which has no embedding; of the last, with the heads. Of many micro-batches, in flight and
behind these, two numbers are run, and a line is laid through them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineSchedule
from torch.distributed.pipelining.stage import InferenceMode

from benchmarks.fake_gpu import put_on
from torchtitan_mtp import trainer
from torchtitan_mtp.distributed import pipeline
from torchtitan_mtp.distributed.pipeline import Pipeline
from torchtitan_mtp.distributed.stages import SPLIT_BACKWARD
from torchtitan_mtp.models.trunk import Trunk


def kinds_of_ranks(degree: int) -> list[int]:
    """Of a pipeline's ranks those that are run; the ones between cost as the second or less."""
    return sorted({0, min(1, degree - 1), degree - 1})


def shorten(pieces: Pipeline, micro_batches: int, in_flight: int) -> None:
    """Have 1F1B run fewer micro-batches than the pipeline has stages, and as few in flight."""
    schedule: Any = pieces.schedule
    schedule._n_microbatches = micro_batches
    schedule._num_stages = pieces.rank + in_flight


def bubble(schedule: str, degree: int, micro_batch: float) -> float:
    """Seconds of a step in which a rank of a pipeline of equal stages has nothing to do.

    micro_batch: seconds of one on one stage, forward and backward. The first one reaches the last
    rank, and the last one's gradient the first rank, after R - 1 stages. Schedules that split the
    backward fill this: 0.
    """
    return 0.0 if schedule in SPLIT_BACKWARD else (degree - 1) * micro_batch


def watch(pieces: Pipeline, now: Callable[[], float], reducing: Callable[[], None]) -> Micro:
    """The times of a pipeline's micro-batches, as they will be; reducing: called when their
    backwards are done and gradients are reduced."""
    schedule: Any = pieces.schedule
    found = Micro(len(pieces.stages))
    losses = "_maybe_compute_loss"  # of the heads, and their backwards
    setattr(schedule, losses, found.timed((-1, losses), getattr(schedule, losses), now))
    for stage in getattr(schedule, "_stages", None) or [schedule._stage]:
        for name in ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk"):
            setattr(stage, name, found.timed((stage.stage_index, name), getattr(stage, name), now))
        reduce = stage.perform_reduce_grad
        stage.perform_reduce_grad = functools.partial(_after, reducing, reduce)
    return found


def _after(first: Callable[[], None], then: Callable[..., Any], *args: Any) -> Any:
    first()
    return then(*args)


class Micro:
    """Seconds of a rank's micro-batches: of each part of one, the least. (The first ones gather
    what all compute with.)"""

    def __init__(self, stages: int = 1) -> None:
        self.stages, self.least = stages, dict[tuple[int, str], float]()

    @property
    def seconds(self) -> float:
        """Of one, on one of the rank's stages."""
        return sum(self.least.values()) / self.stages

    def timed(
        self, key: tuple[int, str], run: Callable[..., Any], now: Callable[[], float]
    ) -> Callable[..., Any]:
        def timing(*args: Any, **kwargs: Any) -> Any:
            begin = now()
            out = run(*args, **kwargs)
            self.least[key] = min(self.least.get(key, float("inf")), now() - begin)
            return out

        return timing


@contextlib.contextmanager
def pieces_on(device: Any) -> Iterator[None]:
    """Models, and pipelines' stages, are made on a fake device: of stages only a rank's own. What
    a pipeline's ranks ask one another before the first step has been answered."""
    really = pipeline.parallelize

    def put_and_parallelize(part: Trunk, *others: Any) -> Trunk:
        put_on(part, device)
        return really(part, *others)

    def answered(_: Any, stages: list[PipelineStage], *__: Any) -> None:
        for stage in stages:
            stage._inference_mode = InferenceMode.STATIC

    with (
        mock.patch.object(trainer, "parallelize", put_and_parallelize),
        mock.patch.object(pipeline, "parallelize", put_and_parallelize),
        mock.patch.object(_PipelineSchedule, "_warmup_p2p", answered),
        mock.patch.object(pipeline, "int", _place, create=True),
    ):
        yield


def _place(index: Any) -> int:
    """A micro-batch's number, of its index [1]: the place in the `arange` that it is part of."""
    return index.storage_offset() if isinstance(index, Tensor) else int(index)
