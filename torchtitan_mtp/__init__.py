"""Train language models that predict n future tokens per position."""
