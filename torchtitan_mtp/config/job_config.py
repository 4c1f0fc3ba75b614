"""The whole configuration of a run: one attribute for each table of the TOML file."""

from dataclasses import dataclass, field

from torchtitan_mtp.config.sections.checkpoint import Checkpoint
from torchtitan_mtp.config.sections.model import Model
from torchtitan_mtp.config.sections.mtp import MTP, Loss
from torchtitan_mtp.config.sections.parallelism import ActivationCheckpoint, Compile, Parallelism
from torchtitan_mtp.config.sections.quantize import Quantize
from torchtitan_mtp.config.sections.run import Comm, Job, Metrics, Profiling
from torchtitan_mtp.config.sections.training import LRScheduler, Optimizer, Training, Validation


@dataclass
class JobConfig:
    """Every table. Names, types and defaults are TorchTitan v0.2's where it has the key."""

    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    mtp: MTP = field(default_factory=MTP)
    loss: Loss = field(default_factory=Loss)
    training: Training = field(default_factory=Training)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    validation: Validation = field(default_factory=Validation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    metrics: Metrics = field(default_factory=Metrics)
    parallelism: Parallelism = field(default_factory=Parallelism)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    compile: Compile = field(default_factory=Compile)
    quantize: Quantize = field(default_factory=Quantize)
    profiling: Profiling = field(default_factory=Profiling)
    comm: Comm = field(default_factory=Comm)

    @property
    def num_future_tokens(self) -> int:
        """n, how many future tokens each position predicts: 1 without the converter "mtp"."""
        return self.mtp.num_future_tokens if "mtp" in self.model.converters else 1

    @property
    def target_loss(self) -> str | None:
        """`mtp.target_loss` where heads 2..n learn from the trunk; None: labels alone."""
        taught = self.num_future_tokens > 1 and self.mtp.target == "trunk"
        return self.mtp.target_loss if taught else None

    @property
    def loss_passes(self) -> str:
        """`loss.passes` with "auto" resolved."""
        if self.loss.passes != "auto":
            return self.loss.passes
        return "compiled" if self.compile.enable and "loss" in self.compile.components else "eager"
