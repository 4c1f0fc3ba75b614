"""Train language models that predict n future tokens per position."""

__version__ = "0.2.0.dev0"
