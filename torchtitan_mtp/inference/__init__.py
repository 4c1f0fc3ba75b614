"""Generation with a key-value cache, plain and self-speculative."""

from torchtitan_mtp.inference.decoding import generate, next_logits
from torchtitan_mtp.inference.load import load_for_inference
from torchtitan_mtp.inference.rows import Generation
from torchtitan_mtp.inference.stats import Stats

__all__ = ["Generation", "Stats", "generate", "load_for_inference", "next_logits"]
