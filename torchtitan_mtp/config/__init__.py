"""The configuration of a run: dataclasses of every table, read from TOML and the command line."""

from torchtitan_mtp.config.checks import check
from torchtitan_mtp.config.job_config import JobConfig
from torchtitan_mtp.config.manager import load_toml, parse_args
from torchtitan_mtp.config.sections.checkpoint import Checkpoint
from torchtitan_mtp.config.sections.mtp import MTP
from torchtitan_mtp.config.sections.parallelism import ActivationCheckpoint, Parallelism
from torchtitan_mtp.config.sections.quantize import Float8Linear
from torchtitan_mtp.config.sections.run import Comm
from torchtitan_mtp.config.sections.training import LRScheduler, Optimizer
from torchtitan_mtp.config.toml_file import to_toml

__all__ = [
    "MTP",
    "ActivationCheckpoint",
    "Checkpoint",
    "Comm",
    "Float8Linear",
    "JobConfig",
    "LRScheduler",
    "Optimizer",
    "Parallelism",
    "check",
    "load_toml",
    "parse_args",
    "to_toml",
]
