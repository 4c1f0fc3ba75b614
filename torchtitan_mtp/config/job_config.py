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
    """The run as a whole."""

    model: Model = field(default_factory=Model)
    """The model and what is done to it."""

    mtp: MTP = field(default_factory=MTP)
    """Multi-token prediction."""

    loss: Loss = field(default_factory=Loss)
    """The linear cross-entropy."""

    training: Training = field(default_factory=Training)
    """Data, batch, length and precision."""

    optimizer: Optimizer = field(default_factory=Optimizer)
    """How a gradient changes the weights."""

    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    """Learning rate over the run."""

    validation: Validation = field(default_factory=Validation)
    """Loss on held-out documents."""

    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    """Saving and loading."""

    metrics: Metrics = field(default_factory=Metrics)
    """What is logged."""

    parallelism: Parallelism = field(default_factory=Parallelism)
    """How ranks share the work."""

    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    """What is recomputed in the backward."""

    compile: Compile = field(default_factory=Compile)
    """torch.compile."""

    quantize: Quantize = field(default_factory=Quantize)
    """Training in 8 bits."""

    profiling: Profiling = field(default_factory=Profiling)
    """Traces and memory snapshots."""

    comm: Comm = field(default_factory=Comm)
    """Communication between processes."""

    @property
    def num_future_tokens(self) -> int:
        """n, how many future tokens each position predicts: 1 without the converter "mtp"."""
        return self.mtp.num_future_tokens if "mtp" in self.model.converters else 1
