"""What a run goes on from, as its folder says before anything is built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from torchtitan_mtp.checkpoint import folders
from torchtitan_mtp.checkpoint.record import keeps_earlier
from torchtitan_mtp.config import JobConfig, load_toml
from torchtitan_mtp.config.checks import check_new_run
from torchtitan_mtp.errors import UserError


def find_origin(config: JobConfig) -> tuple[int, str, bool]:
    """The seed of a run and the type it computes in: the configured ones; else, without a seed or
    with "auto", the run's until now, by its config.toml; else a drawn seed, and "auto". And whether
    its model has what its flavor had before it became TorchTitan's, by the checkpoint that it
    resumes from or starts with (`keeps_earlier`). Error: the newest checkpoint, or config.toml, is
    damaged; a seed is to be made where there is more; `check_new_run`."""
    checkpoint, training, path = config.checkpoint, config.training, None
    seed, precision = training.seed, training.mixed_precision_param
    if checkpoint.enable:
        folder = folders.checkpoint_folder(config.job.dump_folder, checkpoint.folder)
        finished = folders.finished_steps(folder)
        if checkpoint.create_seed_checkpoint and any(finished):
            raise UserError(
                f"checkpoint.create_seed_checkpoint: {folder} has trained weights already "
                f"(step-{finished[-1]}); choose another job.dump_folder, or unset it to train"
            )
        step = folders.chosen_step(folder, checkpoint.load_step)
        if step is not None:
            path = folders.step_folder(folder, step)
        elif checkpoint.initial_load_path and not checkpoint.initial_load_model_only:
            path = folders.find_checkpoint(checkpoint.initial_load_path)
        written = Path(config.job.dump_folder) / "config.toml"
        if (seed is None or precision == "auto") and finished and written.is_file():
            before = load_toml(written).training
            seed = before.seed if seed is None else seed
            precision = before.mixed_precision_param if precision == "auto" else precision
    if path is None:
        check_new_run(config)
    seed = torch.seed() % 2**31 if seed is None else seed
    return seed, precision, keeps_earlier(config, path)


def completed(config: JobConfig, seed: int, param_dtype: torch.dtype) -> JobConfig:
    """The configuration that a run goes by, and its config.toml then says: with its seed, which
    tells which documents were held out, and the type that it computes in, which "auto" might choose
    anew; without the converter "mtp" one future token."""
    checkpoint = config.checkpoint
    if checkpoint.initial_load_in_hf and not checkpoint.initial_load_path:
        checkpoint = replace(checkpoint, initial_load_path=config.model.hf_assets_path)
    precision = cast(Any, str(param_dtype).removeprefix("torch."))
    training = replace(config.training, seed=seed, mixed_precision_param=precision)
    mtp = replace(config.mtp, num_future_tokens=config.num_future_tokens)
    return replace(config, training=training, mtp=mtp, checkpoint=checkpoint)
