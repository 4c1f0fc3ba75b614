"""Where metrics go: TensorBoard event files, Weights & Biases, both or neither."""

import dataclasses
import logging
import os
import threading
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.distributed.ranks import Ranks
from torchtitan_mtp.errors import import_optional
from torchtitan_mtp.monitoring.observer import Observer

logger = logging.getLogger(__name__)


def _import(package: str, module: str) -> Any:
    missing = f"metrics.enable_{package} = true: the package {package} is not installed"
    return import_optional(module, f"{missing}; pip install {package}, or set it to false")


class TensorBoard:
    """Scalars in event files under `folder`, with the methods of a Weights & Biases run."""

    def __init__(self, folder: str) -> None:
        tensorboard = _import("tensorboard", "torch.utils.tensorboard")  # slow
        # What its thread dies of, the next call raises.
        hook = threading.excepthook
        threading.excepthook = lambda args: (
            None if type(args.thread).__module__.startswith("tensorboard") else hook(args)
        )
        self.writer = tensorboard.SummaryWriter(folder, flush_secs=10)
        logger.info("TensorBoard: %s", folder)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for tag, value in metrics.items():
            self.writer.add_scalar(tag, value, step)

    def finish(self) -> None:
        self.writer.close()


def start_wandb(folder: str, config: JobConfig) -> Any:
    """A Weights & Biases run; project and team from WANDB_PROJECT and WANDB_TEAM."""
    wandb = _import("wandb", "wandb")
    os.makedirs(folder, exist_ok=True)
    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", "torchtitan_mtp"),
        entity=os.environ.get("WANDB_TEAM"),
        dir=folder,
        config=dataclasses.asdict(config),
    )


def metrics_folder(config: JobConfig, rank: int) -> str:
    """`{dump_folder}/{save_tb_folder}/{YYYYmmdd-HHMMSS}`, for all ranks with `/rank_R` below it.

    The time is rank 0's clock when every rank writes (a collective then), so that one run is one
    folder even where clocks differ.
    """
    start = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = os.path.join(config.job.dump_folder, config.metrics.save_tb_folder)
    if not config.metrics.save_for_all_ranks:
        return os.path.join(folder, start)
    return os.path.join(folder, Ranks().gather(start)[0], f"rank_{rank}")


def build_backends(config: JobConfig, rank: int) -> list[Observer]:
    """The backends that [metrics] enables, on rank 0, or on every rank with save_for_all_ranks."""
    metrics = config.metrics
    enabled = metrics.enable_tensorboard or metrics.enable_wandb
    if not enabled or (rank != 0 and not metrics.save_for_all_ranks):
        return []
    folder = metrics_folder(config, rank)
    backends = []
    if metrics.enable_tensorboard:
        backends.append(Observer("TensorBoard", lambda: TensorBoard(folder)))
    if metrics.enable_wandb:
        backends.append(Observer("Weights & Biases", lambda: start_wandb(folder, config)))
    return backends
