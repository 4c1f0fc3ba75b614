"""Checkpoints: save, resume and load weights, whole or not at all."""

from torchtitan_mtp.checkpoint.checkpointer import Checkpointer
from torchtitan_mtp.checkpoint.folders import find_checkpoint, find_config
from torchtitan_mtp.checkpoint.load import LoadReport, load_model_weights

__all__ = [
    "Checkpointer",
    "LoadReport",
    "find_checkpoint",
    "find_config",
    "load_model_weights",
]
