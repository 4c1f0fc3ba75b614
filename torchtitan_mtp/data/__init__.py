"""Documents to tokens, tokens to windows, windows to the targets of every head."""

from torchtitan_mtp.data.loader import DataLoader
from torchtitan_mtp.data.sources import build_source
from torchtitan_mtp.data.targets import Window, make_batch
from torchtitan_mtp.data.tokenizer import build_tokenizer

__all__ = ["DataLoader", "Window", "build_source", "build_tokenizer", "make_batch"]
