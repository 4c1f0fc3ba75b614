"""The whole configuration of a run: one attribute for each table of the TOML file."""

from dataclasses import dataclass

from torchtitan_mtp.config.sections.checkpoint import Checkpoint
from torchtitan_mtp.config.sections.mtp import MTP, Loss
from torchtitan_mtp.config.sections.parallelism import ActivationCheckpoint, Compile, Parallelism
from torchtitan_mtp.config.sections.quantize import Quantize
from torchtitan_mtp.config.sections.run import (
    Comm,
    Debug,
    Experimental,
    FaultTolerance,
    Job,
    MemoryEstimation,
    Metrics,
    Profiling,
)
from torchtitan_mtp.config.sections.training import (
    LRScheduler,
    Model,
    Optimizer,
    Training,
    Validation,
)
from torchtitan_mtp.config.setting import setting


@dataclass
class JobConfig:
    """Every table. Names, types and defaults are TorchTitan v0.2's where it has the key."""

    job: Job = setting(Job)
    """The run as a whole."""

    model: Model = setting(Model)
    """The model and what is done to it."""

    mtp: MTP = setting(MTP)
    """Multi-token prediction."""

    loss: Loss = setting(Loss)
    """The linear cross-entropy."""

    training: Training = setting(Training)
    """Data, batch, length and precision."""

    optimizer: Optimizer = setting(Optimizer)
    """How a gradient changes the weights."""

    lr_scheduler: LRScheduler = setting(LRScheduler)
    """Learning rate over the run."""

    validation: Validation = setting(Validation)
    """Loss on held-out documents."""

    checkpoint: Checkpoint = setting(Checkpoint)
    """Saving and loading."""

    metrics: Metrics = setting(Metrics)
    """What is logged."""

    parallelism: Parallelism = setting(Parallelism)
    """How ranks share the work."""

    activation_checkpoint: ActivationCheckpoint = setting(ActivationCheckpoint)
    """What is recomputed in the backward."""

    compile: Compile = setting(Compile)
    """torch.compile."""

    quantize: Quantize = setting(Quantize)
    """Training in 8 bits."""

    profiling: Profiling = setting(Profiling)
    """Traces and memory snapshots."""

    comm: Comm = setting(Comm)
    """Communication between processes."""

    debug: Debug = setting(Debug)
    """TorchTitan v0.2.1's other place for seed and determinism."""

    memory_estimation: MemoryEstimation = setting(MemoryEstimation)
    """Not available here."""

    fault_tolerance: FaultTolerance = setting(FaultTolerance)
    """Not available here."""

    experimental: Experimental = setting(Experimental)
    """Not available here."""
