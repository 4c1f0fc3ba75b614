"""Whole trainings small enough for a test: a corpus, a configuration, a run and what came of it."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchtitan_mtp.config import JobConfig, check
from torchtitan_mtp.config.setting import options
from torchtitan_mtp.inference.acceptance import Acceptance
from torchtitan_mtp.models.args import LatentArgs, ModelArgs, MoEArgs
from torchtitan_mtp.models.flavors import flavors
from torchtitan_mtp.monitoring.losses import HeadLosses
from torchtitan_mtp.trainer import Trainer

TINY = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=32, rope_theta=10000.0)
EXPERTS = ModelArgs(
    dim=32,
    n_layers=2,
    n_heads=4,
    hidden_dim=48,
    latent=LatentArgs(
        q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16
    ),
    moe=MoEArgs(num_experts=8, hidden_dim=16, num_expert_groups=4, num_limited_groups=2),
)
SOURCES = ("python_stdlib", "text", "jsonl", "jsonl.gz", "parquet")
BASE: dict[str, Any] = {
    "model.flavor": "tiny",
    "model.converters": ["mtp"],
    "mtp.num_future_tokens": 3,
    "training.seq_len": 32,
    "training.local_batch_size": 2,
    "training.steps": 6,
    "training.seed": 0,
    "training.mixed_precision_param": "float32",
    "lr_scheduler.warmup_steps": 2,
    "metrics.log_freq": 1,
    "activation_checkpoint.mode": "none",
    "validation.seq_len": 32,
    "validation.local_batch_size": 2,
}
SEQUENTIAL = {"mtp.heads": "sequential"}
HEAD_BY_HEAD = {"mtp.engine": "head_by_head"}
JOINT = {"mtp.engine": "joint"}
DEEPSEEK = {**SEQUENTIAL, "model.name": "deepseek_v3"}
LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCH_FR_BUFFER_SIZE")


class Interrupted(Exception):
    """Raised in place of a power cut."""


@dataclass
class Run:
    """What a run logged, step by step, and the weights that it ended with."""

    logged: list[dict[str, Any]] = field(default_factory=list)
    validated: list[list[float]] = field(default_factory=list)
    acceptance: list[Acceptance] = field(default_factory=list)  # of each validation
    weights: dict[str, Tensor] = field(default_factory=dict)
    start: int = 0

    @property
    def losses(self) -> list[list[float]]:
        """Losses of heads 1..n, step by step."""
        return [step["head_losses"] for step in self.logged]

    @property
    def trunk(self) -> dict[str, Tensor]:
        """The weights outside the heads."""
        return {name: w for name, w in self.weights.items() if not name.startswith("mtp.")}


@contextlib.contextmanager
def a_world() -> Iterator[None]:
    """Trainings with one thread that leave nothing for the next."""
    kept = {name: os.environ.pop(name) for name in LAUNCH if name in os.environ}
    threads, logger = torch.get_num_threads(), logging.getLogger("torchtitan_mtp")
    level, propagate = logger.level, logger.propagate
    torch.set_num_threads(1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in LAUNCH:
        os.environ.pop(name, None)
    os.environ.update(kept)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.compiler.reset()
    logger.setLevel(level)
    logger.propagate = propagate


def documents(count: int = 40, seed: int = 0) -> list[str]:
    """Texts of words, from two characters to some hundreds."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 6))) for _ in range(30)]
    texts = [" ".join(rng.choices(words, k=rng.choice([1, 5, 20, 60]))) for _ in range(count - 1)]
    return ["hi", *texts]


def validation(folder: Path, freq: int) -> dict[str, Any]:
    """Keys of a validation every `freq` steps on `folder`'s held-out corpus."""
    return {
        "validation.enable": True,
        "validation.dataset": "held_out",
        "validation.dataset_path": str(folder / "held_out" / "corpus.jsonl"),
        "validation.freq": freq,
    }


def write_corpus(folder: Path, kind: str, count: int = 40, seed: int = 0) -> dict[str, Any]:
    """The keys of [training] that read a new corpus of that kind."""
    if kind == "python_stdlib":
        return {"training.dataset": kind}
    folder.mkdir(parents=True, exist_ok=True)
    texts = documents(count, seed)
    path = folder / f"corpus.{kind}"
    if kind == "text":
        path.mkdir()
        for i, text in enumerate(texts):
            (path / f"{i:03}.txt").write_text(text)
    elif kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": texts}), path, row_group_size=7)
    else:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        path.write_bytes(gzip.compress(lines, mtime=0) if kind.endswith(".gz") else lines)
    return {"training.dataset": "corpus", "training.dataset_path": str(path)}


def config_of(folder: Path, *changes: Mapping[str, Any]) -> JobConfig:
    """A checked configuration: BASE with dotted names changed. `folder` gets the run's output, and
    a corpus where no change names the data."""
    flavors["llama3"].setdefault("tiny", TINY)
    flavors["deepseek_v3"].setdefault("tiny", EXPERTS)
    values = {**BASE, "job.dump_folder": str(folder / "run")}
    for change in changes:
        values |= change
    if "training.dataset" not in values:
        corpus = folder / "corpus.jsonl"
        if not corpus.exists():
            write_corpus(folder, "jsonl")
        values |= {"training.dataset": "corpus", "training.dataset_path": str(corpus)}
    config, known = JobConfig(), options(JobConfig)
    for name, value in values.items():
        known[name].set(config, value)
    check(config)
    return config


def train(config: JobConfig, prepare: Callable[[Trainer], object] | None = None) -> Run:
    """Run to the end, or to `Interrupted`. `prepare` sees the trainer before its first step."""
    trainer = Trainer(config)
    try:
        run = record(trainer)
        if prepare is not None:
            prepare(trainer)
        with contextlib.suppress(Interrupted):
            trainer.train()
        run.weights = weights_of(trainer)
    finally:
        finish(trainer)
    return run


def record(trainer: Trainer) -> Run:
    """Collects what the trainer reports from now on."""
    run, metrics = Run(start=trainer.state.step), trainer.metrics
    log, log_validation = metrics.log, metrics.log_validation

    def keep(step: int, heads: HeadLosses, others: dict[str, float]) -> None:
        kinds = {tag: tag.split("/")[0] for tag in others}
        extra = {tag: v for tag, v in others.items() if kinds[tag] in ("moe", "skipped_steps")}
        values = {tag: v for tag, v in others.items() if kinds[tag] == tag and tag not in extra}
        run.logged.append(
            {
                "step": step,
                "head_losses": heads.losses,
                "head_accuracies": heads.accuracies,
                "global_total_loss": heads.total,
                "global_max_loss": heads.max_loss,
                "head_scales": [v for tag, v in others.items() if kinds[tag] == "mtp"],
                **values,
                "extra_metrics": extra,
            }
        )
        log(step, heads, others)

    def keep_validation(step: int, heads: HeadLosses, acceptance: Acceptance, **rest: Any) -> None:
        run.validated.append(heads.losses)
        run.acceptance.append(acceptance)
        log_validation(step, heads, acceptance, **rest)

    metrics.log, metrics.log_validation = keep, keep_validation  # type: ignore[method-assign]
    return run


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    """Whole copies of all parameters and of experts' biases, on every rank."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in trainer.model.state_dict().items()
        if not (name == "output.weight" and trainer.model.args.tied_embeddings)
    }


def interrupt_after(step: int) -> Callable[[Trainer], None]:
    """For `prepare`: the run ends without ceremony once `step` and its checkpoint are done."""

    def prepare(trainer: Trainer) -> None:
        save = trainer.checkpointer.save

        def save_and_die(at: int, **options: Any) -> bool:
            saved = save(at, **options)
            if at == step:
                raise Interrupted
            return saved

        trainer.checkpointer.save = save_and_die  # type: ignore[method-assign]

    return prepare


def finish(trainer: Trainer) -> None:
    """Close a trainer; a group of several ranks belongs to the test and stays."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        trainer.close()
        return
    trainer.lock.close()
    for part in (trainer.checkpointer, trainer.metrics, trainer.loader, trainer.gc):
        part.close()


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Equal to the bit, name by name."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def largest_difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Over all weights."""
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)
