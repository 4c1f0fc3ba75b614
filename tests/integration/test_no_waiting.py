"""The host does not wait for the GPU: not in a step between log lines, nor in a batch of
validation, and once in a step of decoding. Each wait would let the GPU run dry."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException

import torchtitan_mtp.inference.decoding
import torchtitan_mtp.monitoring.metrics
import torchtitan_mtp.trainer
from pretend import DEVICE, PretendGPU
from runs import DEEPSEEK, HEAD_BY_HEAD, JOINT, SEQUENTIAL, config_of
from spawn import run_ranks
from tests.small import ARGS
from torchtitan_mtp.config import MTP
from torchtitan_mtp.distributed.mesh import Degrees, world_of
from torchtitan_mtp.inference.decoding import Decoder, generate
from torchtitan_mtp.models.packed import block_mask
from torchtitan_mtp.models.transformer import Transformer, build_model
from torchtitan_mtp.mtp import add_heads
from torchtitan_mtp.trainer import Trainer

BF16 = {"training.mixed_precision_param": "bfloat16"}
OPS = {"activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "op"}
RUNS = {
    "head_by_head": {**HEAD_BY_HEAD, **BF16, **OPS},
    "chain": {**SEQUENTIAL, "model.attn_mask_type": "block_causal"},
}
MORE_RUNS = {
    "joint": {**JOINT, "training.global_batch_size": 4},  # in two micro-batches
    "experts": {**DEEPSEEK, **BF16},
    "medusa": {"mtp.heads": "medusa"},
    "distilled": {"mtp.target": "trunk", "mtp.train": "heads"},
    "triton": {**BF16, "mtp.target": "trunk", "loss.passes": "triton", "loss.bf16_logits": True},
}
KEYS = {
    "mtp.num_future_tokens": 2,
    "metrics.log_freq": 100,
    "validation.enable": True,
    "validation.steps": 2,
}


def trainer_on(gpu: PretendGPU, folder: Path, keys: dict) -> Trainer:
    """A trainer whose device is the GPU that is not there."""
    device = torch.device(*DEVICE)
    module = torchtitan_mtp.trainer

    def init_world(*_):
        return world_of(device, Degrees())

    def parallelize(*arguments):
        with gpu:
            return original(*arguments)

    original, module.parallelize = module.parallelize, parallelize
    module.init_world = init_world
    module.check_run = module.peak_flops = lambda *_: None
    none = {"memory/max_reserved(GiB)": 0.0, "memory/max_reserved(%)": 0.0}
    memory = SimpleNamespace(peak=lambda: none, reset=lambda: None)
    torchtitan_mtp.monitoring.metrics.MemoryMonitor = lambda _: memory
    Transformer.init_weights = lambda model, seed: model.init_buffers()
    try:
        return Trainer(config_of(folder, KEYS, keys))
    finally:
        module.parallelize = original


def training(gpu: PretendGPU, folder: Path, keys: dict) -> dict[str, list[str]]:
    """What the host waits for in a logged step, in one that is not, in validation."""
    trainer = trainer_on(gpu, folder, keys)
    logged, step = gpu.waited(trainer.train_step), gpu.waited(trainer.train_step)
    assert trainer.optimizer.state and not trainer.state.skipped  # the optimizer ran
    validation = gpu.waited(trainer.evaluate)
    trainer.loader.close()
    trainer.lock.close()
    return {"step": step, "logged": logged, "validation": validation}


def decoding(gpu: PretendGPU, heads: str, static: bool) -> list[list[str]]:
    """What the host waits for in each step of decoding two prompts of unequal lengths, sampled; in
    static shapes, what is recorded as CUDA graphs, which no wait may be in."""
    model = add_heads(build_model(ARGS), MTP(heads=heads, num_future_tokens=3))
    steps: list[int] = []

    def plan(decoder, count, plan=Decoder.plan):
        steps.append(len(gpu.notes))
        return plan(decoder, count)

    def decode():
        model.to_empty(device=torch.device(*DEVICE))
        model.init_buffers()
        options = {"temperature": 0.7, "top_p": 0.9, "speculative": True, "cuda_graphs": static}
        generate(model, [[1, 2, 3], [4]], 7, **options)

    original, Decoder.plan = Decoder.plan, plan
    notes = gpu.waited(decode)
    Decoder.plan = original
    return [notes[a:b] for a, b in zip(steps[1:], [*steps[2:], None], strict=True)]


def what_waits(gpu: PretendGPU) -> dict[str, list[str]]:
    """Single operations, for what is noted of them."""
    with gpu:
        x, host = torch.zeros(4, 4, device=torch.device(*DEVICE)), torch.zeros(4)
        pinned, rows = host.pin_memory(), torch.tensor([1, 2])
    acts = {
        "a list": lambda: torch.tensor([1.0], device=x.device),
        "pageable": lambda: host.to(x.device, non_blocking=True),
        "blocking": lambda: pinned.to(x.device),
        "value": lambda: x[0, 0].item(),
        "truth": lambda: bool((x > 0).all()),
        "numbers": lambda: x.tolist(),
        "copy": lambda: host.copy_(x[0]),
        "mask": lambda: x[x > 0],
        "set by mask": lambda: x.__setitem__(x > 0, x.sum()),
        "where": lambda: x.nonzero(),
        "rows of the host": lambda: x[rows],
        # and what does not wait
        "pinned": lambda: pinned.to(x.device, non_blocking=True),
        "sent": lambda: x.to("cpu", non_blocking=True),
        "number": lambda: torch.where(x > 0, x, 0.0).mul_(2).clamp(min=1),
        "made there": lambda: torch.full((3,), 1.0, device=x.device),
        "on the host": lambda: host[host > 0].tolist(),
        "document mask": lambda: block_mask(x.long()),
    }
    found = {}
    for name, act in acts.items():
        # Of some results nobody knows the size here.
        with contextlib.suppress(DynamicOutputShapeException):
            gpu.waited(act)
        found[name] = list(gpu.notes)
    return found


def without_kernel() -> None:
    """Triton's kernel computes nothing, as the GPU does."""
    with contextlib.suppress(ImportError):
        importlib.import_module("torchtitan_mtp.ops.triton_losses")._row_kernel = MagicMock()
    torch.cuda.device_of = lambda tensor: contextlib.nullcontext()


def everything(_: int, folder: str, runs: dict) -> dict:
    gpu = PretendGPU()
    without_kernel()
    found: dict = {"operations": what_waits(gpu)}
    for name, keys in runs.items():
        found[name] = training(gpu, Path(folder) / name, keys)
    torchtitan_mtp.inference.decoding.cuda_graph = lambda device: lambda step: step
    for heads in ("parallel", "sequential", "medusa"):
        for static in (False, True):
            found["decoding", heads, static] = decoding(gpu, heads, static)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_ranks(1, everything, str(tmp_path_factory.mktemp("pretend")), RUNS)[0]


def test_what_waits_is_seen(found):
    silent = ["pinned", "sent", "number", "made there", "on the host", "document mask"]
    assert [name for name, notes in found["operations"].items() if not notes] == silent


def check_training(found):
    """A step waits for what the one before was to do and no more: for its own number of targets,
    which the GPU adds up first of all, when the rest of it is under way. A logged one also for the
    verdict on it and for figures that were all on their way by then; validation at its end."""
    step, logged, validation = found["step"], found["logged"], found["validation"]
    waits = "waits for an event: "
    assert len(step) == 1 and step[0].startswith(waits + "trainer.py"), step
    assert all(note.startswith(waits) for note in logged), logged
    counts, means = validation
    assert counts.startswith("int64[4, 1] goes to the host: ") and means.startswith(waits)


@pytest.mark.parametrize("name", RUNS)
def test_training_does_not_wait(name, found):
    check_training(found[name])


@pytest.mark.exhaustive
def test_other_training_does_not_wait(tmp_path):
    found = run_ranks(1, everything, str(tmp_path), MORE_RUNS)[0]
    for name in MORE_RUNS:
        check_training(found[name])


@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
@pytest.mark.parametrize("heads", ["parallel", "sequential", "medusa"])
def test_a_decoding_step_waits_once(heads, static, found):
    first, second = found["decoding", heads, static]  # of 3 tokens each, after the prompt's own
    for notes in (first, second):
        assert [note.partition(": ")[0] for note in notes] == ["int64[2, 2, 3] goes to the host"]
