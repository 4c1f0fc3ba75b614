"""What a run needs at the least, held against the memory there is before anything is read."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.distributed.mesh import launch_number
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.trunk import Trunk

GIB = 1024**3
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def total_memory(device: torch.device) -> int:
    """Bytes of a GPU; or of this machine, or of its control group where that has fewer."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # there is none, or it says "max"
            found.append(int(Path(path).read_text()))
    return min(found)


def check_memory(needs: Mapping[str, int], device: torch.device) -> None:
    """needs: bytes of this rank at the least, by the keys to lower. Error: more than there is."""
    total, memory = sum(needs.values()), total_memory(device)
    if device.type == "cpu":
        memory //= launch_number("LOCAL_WORLD_SIZE", 1, least=1)
    if total > memory:
        most = max(needs, key=needs.__getitem__)
        raise UserError(
            f"{most}: needs {needs[most] / GIB:,.1f} GiB of memory, all together at least "
            f"{total / GIB:,.1f}, and a rank has {memory / GIB:,.1f} ({device}); lower it"
        )


def check_run(
    config: JobConfig, model: Trunk, device: torch.device, ranks: int, accumulation: int
) -> None:
    """Error: a training of `model` (on meta) can't fit, whatever is sharded or computed twice."""
    training, validation, n = config.training, config.validation, config.num_future_tokens
    parallelism, sequences = config.parallelism, training.local_batch_size
    cp, tp = parallelism.context_parallel_degree, parallelism.tensor_parallel_degree
    if parallelism.pipeline_parallel_degree > 1:
        sequences = parallelism.pipeline_parallel_microbatch_size
    data, state = dict[str, int](), dict[str, int]()
    for table, keys, times in (
        ("training", training, accumulation),
        ("validation", validation, int(validation.enable)),
    ):
        name = f"{table}.local_batch_size = {keys.local_batch_size}, seq_len = {keys.seq_len}"
        name += f", {times:,} of them a step" if times > 1 else ""
        # Labels [n], future tokens [n-1], tokens, positions and documents in int64.
        data[name] = 16 * (n + 1) * times * keys.local_batch_size * keys.seq_len // cp
    longest = model.args.max_seq_len
    state[f"seq_len = {longest}"] = 4 * model.args.rope_dim * longest
    rows = min(config.loss.chunk_rows or 1, sequences * training.seq_len // cp)
    state[f"loss.chunk_rows = {rows}"] = 2 * rows * model.tok_embeddings.num_embeddings // tp
    largest = max(model.named_parameters(), key=lambda item: item[1].numel())[0]
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    size //= ranks // parallelism.data_parallel_replicate_degree
    trains = config.mtp.train == "all" and not config.checkpoint.create_seed_checkpoint
    copies = 4 if trains else 1  # with gradients and the optimizer's two moments
    where = data if training.enable_cpu_offload else state
    where[f"model.args, model.vocab_size: {largest} and the other weights"] = copies * size
    if device.type != "cpu":
        check_memory(state, device)
        state = {}
    check_memory(data | state, torch.device("cpu"))
