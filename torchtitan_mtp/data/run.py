"""What a run reads, as its configuration has it: its two loaders, and how many batches a step."""

from __future__ import annotations

from functools import partial

from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.data.loader import DataLoader
from torchtitan_mtp.data.mixture import source_from_config
from torchtitan_mtp.data.tokenizer import Tokenizer
from torchtitan_mtp.errors import UserError


def loaders_from_config(
    config: JobConfig, tokenizer: Tokenizer, rank: int, ranks: int
) -> tuple[DataLoader, DataLoader | None]:
    """One data rank's loaders for training and, where it is on, for validation, by the seed in
    `config`. Errors: those of `source_from_config` and `DataLoader`."""
    training, validation = config.training, config.validation
    assert training.seed is not None
    source = source_from_config(config, training)
    held_out = validation.enable and not validation.dataset and not validation.dataset_path
    make = partial(
        DataLoader,
        tokenizer=tokenizer,
        num_future_tokens=config.num_future_tokens,
        dp_rank=rank,
        dp_world=ranks,
        seed=training.seed,
        validation_fraction=training.validation_fraction,
    )
    loader = make(
        source,
        seq_len=training.seq_len,
        local_batch_size=training.local_batch_size,
        split="train" if held_out else "all",
        accept_changed_data=training.accept_changed_data,
    )
    if not validation.enable:
        return loader, None
    return loader, make(
        source if held_out else source_from_config(config, validation),
        seq_len=validation.seq_len,
        local_batch_size=validation.local_batch_size,
        split="validation" if held_out else "all",
        infinite=False,
    )


def micro_batches_in_window(config: JobConfig) -> int:
    """Into how many micro-batches what a loader gives is split: in a pipeline, by their size."""
    if config.parallelism.pipeline_parallel_degree == 1:
        return 1
    return config.training.local_batch_size // config.parallelism.pipeline_parallel_microbatch_size


def micro_batches_per_step(config: JobConfig, data_ranks: int) -> int:
    """Gradient accumulation steps. Error: the global batch is not a multiple of one pass."""
    local, whole = config.training.local_batch_size, config.training.global_batch_size
    if whole == -1:
        return 1
    if whole % (local * data_ranks):
        nearest = -(-whole // (local * data_ranks)) * local * data_ranks
        raise UserError(
            f"training.global_batch_size = {whole} is not a multiple of local_batch_size = {local} "
            f"times {data_ranks} data ranks; try {nearest}"
        )
    return whole // (local * data_ranks)
