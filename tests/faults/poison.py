"""A batch that makes the model's numbers not finite, on one rank."""

from __future__ import annotations

import torch

from torchtitan_mtp.trainer import Trainer


def poison(trainer: Trainer, steps: set[int], row: int = 1, position: int = 5) -> None:
    """The embedding of these steps' first micro-batch is NaN from one position on, whenever the
    batch is computed: like data that a model overflows on."""
    make, engine = trainer.model.tok_embeddings, trainer.pieces.engine
    bad: list[torch.Tensor] = []

    def note(model, batch, *rest):
        if trainer.state.step + 1 in steps and len(bad) < len(steps):
            bad.append(batch.tokens)
        return engine(model, batch, *rest)

    def spoil(module, arguments, output):
        # A chain embeds pieces of a sequence, here one, each with the tokens after its last one.
        ids = arguments[0].flatten(1)
        if any(torch.equal(ids[:, : tokens.shape[1]], tokens) for tokens in bad):
            spoilt = output.clone()
            spoilt.flatten(1, -2)[row, position] = torch.nan
            return spoilt
        return None

    trainer.pieces.engine = note
    make.register_forward_hook(spoil)


def leave_out_updates(trainer: Trainer, steps: set[int]) -> None:
    """The naive way to skip: do not call the optimizer."""
    update = trainer.optimizer.step

    def step():
        if trainer.state.step + 1 not in steps:
            update()

    trainer.optimizer.step = step
