"""A step of the trainer on one of any number of ranks that are not there, and what it takes.

`Trainer.train_step` itself runs, on a fake rank's tensors and groups: nothing here knows how a
layout shards or communicates. Equal layers, and micro-batches, cost alike: of many, two sizes are
run, and a line laid through them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor

from benchmarks.collectives import Collectives
from benchmarks.fake_gpu import NAME, Allocations, fake_rank
from benchmarks.measure import in_process
from benchmarks.stages import Micro, bubble, kinds_of_ranks, pieces_on, shorten, watch
from benchmarks.streams import Rates, Stream, clock
from torchtitan_mtp.build import model_args_from_config, model_from_config
from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.data.run import micro_batches_in_window, micro_batches_per_step
from torchtitan_mtp.data.targets import Window
from torchtitan_mtp.data.tokenizer import build_tokenizer
from torchtitan_mtp.distributed.mesh import World, mesh_degrees
from torchtitan_mtp.distributed.pipeline import Pipeline
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.trunk import Trunk
from torchtitan_mtp.nonfinite import FiniteGuard
from torchtitan_mtp.ops import autograd
from torchtitan_mtp.trainer import Trainer

KINDS = ("parameters", "moments", "gradients", "activations", "loss", "communication")
EARLY, LATE = "early", "late"
_STEADY = 4  # layers until a block finds the blocks around it as in any deeper trunk
_FEW = 3  # micro-batches that are run at most
_T = TypeVar("_T")


@dataclass
class Step:
    """What a step takes on one rank.

    memory: the bytes alive when most are, by `KINDS`, in each of two spans: up to the backward of
    the first of the equal layers, when activations are there of all of them, and from there, when
    gradients are; of a pipeline, up to the reduction of gradients, and from there. calls, bytes:
    of collectives, by dimension and kind.
    flops: of products, recomputed ones too. seconds: of the step; waits: those of them in which
    computation waited, by dimension and kind. (Of a CPU, these three are 0.)
    Of a pipeline, all is of the fullest of `stages`, but seconds: those of the slowest and of the
    bubble, which is among them. micro_batch: seconds of one on one of this rank's stages.
    """

    memory: dict[str, Counter[str]] = field(default_factory=dict)
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    bytes: Counter[tuple[str, str]] = field(default_factory=Counter)
    flops: int = 0
    seconds: float = 0.0
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    micro_batch: float = 0.0
    bubble: float = 0.0
    stages: dict[int, Step] = field(default_factory=dict)  # by their rank in the pipeline

    @property
    def peak(self) -> Counter[str]:
        """Bytes alive at the worst of the step, by kind."""
        return max(self.memory.values(), key=lambda found: found.total())


def run_step(
    config: JobConfig,
    ranks: int,
    device: str = NAME,
    rates: Rates | None = None,
    micro_batches: int | None = None,
    stage: int = 0,
) -> Step:
    """A step after the first, by the trainer's own code, of all layers and micro-batches that there
    are or, where there are many, by a line through few. rates: of a GPU; None: no times.
    micro_batches: in place of the configuration's. stage: the rank in a pipeline.

    Error: a configuration that can't be followed on fake tensors yet.
    """
    config = copy.deepcopy(config)
    config.compile.enable = config.checkpoint.enable = False
    if config.model.name == "hf":
        raise UserError('model.name = "hf": fake tensors do not follow transformers\' models yet')
    if config.training.enable_cpu_offload:
        key = "training.enable_cpu_offload = true"
        raise UserError(f"{key}: fake tensors do not follow it yet; set it to false")
    micro = micro_batches or micro_batches_per_step(config, data_ranks(config, ranks))
    if config.parallelism.pipeline_parallel_degree > 1:
        micro *= micro_batches_in_window(config)
        return _run_stage(config, ranks, micro, device, rates, stage)

    def at(layers: int, micro: int) -> Step:
        changed = copy.deepcopy(config)
        changed.model.args.n_layers = layers
        return count_step(changed, ranks, micro, device, rates)

    args = model_args_from_config(config, 0)
    return _on_line(
        args.n_layers,
        _few_layers(config, args),
        lambda layers: _on_line(micro, (_FEW - 1, _FEW), lambda count: at(layers, count)),
    )


def _run_stage(
    config: JobConfig, ranks: int, micro: int, device: str, rates: Rates | None, rank: int
) -> Step:
    """A step of a pipeline on this rank of it. micro: its micro-batches, each of a window of its
    own here."""
    parallelism = config.parallelism
    degree, schedule = parallelism.pipeline_parallel_degree, parallelism.pipeline_parallel_schedule
    config.training.local_batch_size = parallelism.pipeline_parallel_microbatch_size

    @functools.cache
    def count(micro: int, few: tuple[int, int] | None = None) -> Step:
        return count_step(config, ranks, micro, device, rates, rank, few)

    if schedule == "GPipe":
        return _on_line(micro, (_FEW - 1, _FEW), count)
    if schedule != "1F1B":
        return count(micro)
    flying = degree - rank  # micro-batches in flight; the others follow one by one
    others, few = micro - flying, (_FEW - 1, _FEW)
    least = _on_line(flying, few, lambda k: count(micro, (k + min(others, 1), k)))
    if others <= 1:
        return least
    k = min(flying, few[0])
    return _along(least, count(micro, (k + 1, k)), count(micro, (k + 2, k)), others - 1)


def run_layout(config: JobConfig, ranks: int, device: str, rates: Rates | None) -> Step:
    """`run_step`, in a process of its own; of a pipeline in several, of ranks that differ."""
    degree = config.parallelism.pipeline_parallel_degree
    kinds = kinds_of_ranks(degree)
    with ThreadPoolExecutor(2) as pool:
        run = functools.partial(in_process, run_step, config, ranks, device, rates, None)
        found = dict(zip(kinds, pool.map(run, kinds), strict=True))
    if degree == 1:
        return found[0]
    each = max(step.micro_batch for step in found.values())
    lost = bubble(config.parallelism.pipeline_parallel_schedule, degree, each)
    seconds = max(step.seconds for step in found.values()) + lost
    fullest = max(found.values(), key=lambda step: step.peak.total())
    return replace(fullest, seconds=seconds, bubble=lost, stages=found)


def data_ranks(config: JobConfig, ranks: int) -> int:
    """Ranks that read windows of their own."""
    degrees = mesh_degrees(config.parallelism, ranks)
    return degrees.dp_replicate * degrees.dp_shard


def _few_layers(config: JobConfig, args: Any) -> tuple[int, int]:
    """Two numbers of layers with all kinds of them, and checkpointed in the same turn."""
    ac = config.activation_checkpoint
    every = 1
    if ac.mode == "selective" and ac.selective_ac_option != "op":
        every = int(ac.selective_ac_option)
    least = _STEADY + (args.moe.n_dense_layers if args.moe else 0)
    if config.mtp.match_parameters:
        least += config.num_future_tokens - 1
    first = args.n_layers - (args.n_layers - least) // every * every
    return first, first + every


def _on_line(x: int, few: tuple[int, int], at: Callable[[int], Step]) -> Step:
    """at(x) itself if that is not more than the few, else what a line through these gives."""
    if x <= few[1]:
        return at(x)
    first, second = (at(k) for k in few)
    return _along(first, first, second, (x - few[0]) / (few[1] - few[0]))


def _along(start: Step, a: Step, b: Step, times: float) -> Step:
    """start + times (b - a), of all numbers in them."""
    found = {
        key: _numbers(value, vars(a)[key], vars(b)[key], times)
        for key, value in vars(start).items()
    }
    return Step(**found)


def _numbers(start: Any, a: Any, b: Any, times: float) -> Any:
    if isinstance(start, dict):
        keys = dict.fromkeys((*start, *a, *b))
        return type(start)({k: _numbers(start[k], a[k], b[k], times) for k in keys})
    value = start + times * (b - a)
    return round(value) if isinstance(start, int) else value


def count_step(
    config: JobConfig,
    ranks: int,
    micro_batches: int,
    device: str,
    rates: Rates | None,
    stage: int = 0,
    few: tuple[int, int] | None = None,
) -> Step:
    """A whole step, with nothing left out. stage: the rank in a pipeline. few: of 1F1B, micro-
    batches that are run, and of them in flight, in place of all."""
    model, degrees = model_on_meta(config), mesh_degrees(config.parallelism, ranks)
    rank = stage * (ranks // degrees.pp)
    with fake_rank(degrees, device, rank) as (world, allocations), pieces_on(world.device):
        trainer = FakeTrainer(config, model, world, allocations, micro_batches)
        if few is not None:
            trainer.shorten(*few)
        return trainer.counted_step(rates)


def model_on_meta(config: JobConfig) -> Trunk:
    """The model with its heads, of a vocabulary that needs no tokenizer's files."""
    assets = config.model.hf_assets_path
    vocabulary = build_tokenizer(assets).vocab_size if assets == "byte" else 0
    return model_from_config(config, vocabulary, getattr(torch, config.training.dtype))


class _Guard(FiniteGuard):
    """All is finite."""

    def _judge(self, *_: Any) -> bool:
        return True


class FakeTrainer(Trainer):
    """A trainer on a fake rank, without data, logs and checkpoints."""

    def __init__(
        self,
        config: JobConfig,
        model: Trunk,
        world: World,
        allocations: Allocations,
        micro_batches: int,
    ) -> None:
        self.config, self.world, self.device = config, world, world.device
        self.n, self.seed, self.accumulation = config.num_future_tokens, 0, micro_batches
        dtype = config.training.mixed_precision_param
        auto = torch.bfloat16 if world.device.type == NAME else torch.float32
        self.param_dtype = auto if dtype == "auto" else getattr(torch, dtype)
        self.loader: Any = SimpleNamespace(next_window=self._window)
        self.tokenizer: Any = None
        self._build_training(model)
        self.guard = _Guard(self.optimizer, 0, self.state, lambda _: "")
        self.heartbeat: Any = SimpleNamespace()
        self.metrics: Any = SimpleNamespace(
            record_step=lambda **_: None, should_log=lambda _: False
        )
        self.allocations, self.micro = allocations, Micro()
        self.peaks: list[tuple[str, int, Callable[[], Counter[str]]]] = []
        self._make_moments()
        self._mark()

    def shorten(self, micro_batches: int, in_flight: int) -> None:
        """Have a pipeline run so many only."""
        assert isinstance(self.pieces, Pipeline)
        self.accumulation = micro_batches
        shorten(self.pieces, micro_batches, in_flight)

    def _window(self) -> Window:
        size = self.config.training.local_batch_size, self.config.training.seq_len + self.n
        zeros = torch.zeros(size, dtype=torch.int64)
        return Window(zeros, torch.zeros_like(zeros))

    def _make_moments(self) -> None:
        """They are there from the first step on."""
        for group in self.optimizer.param_groups:  # experts that ranks share have one of their own
            for param in group["params"]:
                param.grad = torch.zeros_like(param)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _mark(self) -> None:
        allocations, model = self.allocations, self.model
        moments = (t for state in self.optimizer.state.values() for t in state.values())
        allocations.mark("moments", allocations.of(moments))
        allocations.mark(
            "parameters", allocations.of([*self.model.parameters(), *self.model.buffers()])
        )
        if isinstance(self.pieces, Pipeline):
            self._mark_stages(self.pieces)
            return
        engine = self.pieces.engine

        def marking(*args: Any) -> Any:
            before = set(allocations.storages.values())
            self._enter(EARLY)
            out = engine(*args)
            made = set(allocations.storages.values()) - before
            # Those that outlive their micro-batch. (Empty are parameters that are not gathered.)
            allocations.mark("gradients", (a for a in made if a.size))
            return out

        self.pieces.engine = marking
        dense = model.args.moe.n_dense_layers if model.args.moe else 0
        list(model.layers.values())[dense].register_forward_hook(self._at_first)

    def _mark_stages(self, pieces: Pipeline) -> None:
        """Late is from where gradients are reduced, all of which were whole until then."""
        step = pieces.step

        def marking(*args: Any) -> Any:
            self._enter(EARLY)
            out = step(*args)
            grads = (p.grad for p in self.model.parameters() if p.grad is not None)
            self.allocations.mark("gradients", self.allocations.of(grads))
            return out

        pieces.step = marking  # type: ignore[method-assign]
        now = lambda: Stream.current.time if self.timed else 0.0  # noqa: E731
        self.micro = watch(pieces, now, lambda: self._enter(LATE))

    def _at_first(self, _: Any, __: Any, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda _: self._enter(LATE))

    def _enter(self, span: str) -> None:
        """Take the peak of another span from here on."""
        self._leave()
        self.span = span
        self.allocations.begin()

    def _leave(self) -> None:
        allocations = self.allocations
        self.peaks.append((self.span, allocations.peak, allocations.kinds_at_peak()))

    def counted_step(self, rates: Rates | None) -> Step:
        """The step, and what it takes."""
        self.span, self.timed = EARLY, rates is not None
        self.allocations.begin()
        step = Step()
        with contextlib.ExitStack() as stack:
            stack.enter_context(_losses_marked(self.allocations))
            if rates is None:
                counts = stack.enter_context(Collectives(self.world))
                self.train_step()
            else:
                time = stack.enter_context(clock(self.world, rates))
                self.train_step()
                counts, step.flops, step.seconds = time.collectives, time.flops, time.compute.time
                for wait in time.compute.waits:
                    step.waits[wait.collective] += wait.seconds
        self._leave()
        step.calls, step.bytes = counts.calls, counts.bytes
        step.micro_batch = self.micro.seconds
        for span, _, kinds in sorted(self.peaks, key=lambda found: found[1]):
            step.memory[span] = kinds()
        return step


@contextlib.contextmanager
def _losses_marked(allocations: Allocations) -> Iterator[None]:
    """What the loss makes for a chunk of a head's logits."""
    compute = autograd.head_loss_and_grad

    def marking(*args: Any, **kwargs: Any) -> Any:
        with allocations.making("loss"):
            return compute(*args, **kwargs)

    with mock.patch.object(autograd, "head_loss_and_grad", marking):
        yield
