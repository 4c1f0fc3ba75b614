"""Initialisation that depends on the seed and a parameter's name, and on nothing else.

Each parameter has a random stream of its own, so a run starts from the same weights on any number
of ranks, and adding heads to a model leaves its trunk's weights as they were. The price is that
every rank draws whole parameters, one at a time, and keeps its shard.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from torchtitan_mtp.models.transformer import Transformer


@torch.no_grad()
def copy_full_tensor(param: Tensor, value: Tensor) -> None:
    """Copy the full tensor `value`, the same on every rank, into a parameter or its shard."""
    if isinstance(param, DTensor):
        # Slicing needs no communication.
        value = distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)
    param.copy_(value)


def seed_of(name: str, seed: int) -> int:
    """The seed of a parameter's own random stream."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Fill parameters and buffers of a materialised (also sharded) model in place: norm scales are
    one, biases zero; every matrix is a normal of `model.init_std(name)`, cut at three standard
    deviations (the embedding is not cut)."""
    model.init_buffers()
    for name, param in model.named_parameters():
        value = torch.empty(param.shape, dtype=torch.float32, device=param.device)
        std = 0.0 if name.endswith(".bias") else model.init_std(name)
        if param.ndim == 1 or not std:
            value.fill_(1.0 if std else 0.0)
        else:
            generator = torch.Generator(param.device)
            generator.manual_seed(seed_of(name, seed))
            cut = 100.0 if name == "tok_embeddings.weight" else 3.0
            nn.init.trunc_normal_(value, 0.0, std, -cut * std, cut * std, generator=generator)
        copy_full_tensor(param, value.to(param.dtype))
