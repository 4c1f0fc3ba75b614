"""Small models and windows for tests."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchtitan_mtp.config import MTP
from torchtitan_mtp.data.targets import Window
from torchtitan_mtp.models.args import ModelArgs
from torchtitan_mtp.models.init import assign, init_weights
from torchtitan_mtp.models.transformer import Transformer, build_model
from torchtitan_mtp.mtp import add_heads

ARGS = ModelArgs(
    dim=16,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=29,
    multiple_of=16,
    max_seq_len=64,
    attn_mask_type="block_causal",
)


def small_model(
    mtp: MTP | None = None, dtype: torch.dtype = torch.float32, seed: int = 0, **args: Any
) -> Transformer:
    """An initialised model on the CPU, with the heads of `mtp`; norm scales are not all one."""
    model = build_model(replace(ARGS, **args), dtype)
    if mtp is not None:
        add_heads(model, mtp)
    model.to_empty(device="cpu")
    model.tie_weights()
    init_weights(model, seed)
    perturb_norms(model)
    return model


@torch.no_grad()
def perturb_norms(model: Transformer) -> None:
    """Make norm scales uneven, so that taking the wrong norm, or none, shows."""
    for name, param in model.named_parameters():
        if param.ndim == 1:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            scale = 1 + 0.3 * torch.randn(param.shape, generator=generator)
            assign(param, scale.to(param.dtype))


def small_window(batch: int, width: int, seed: int = 0, vocab: int = 29) -> Window:
    """Random tokens in documents of random lengths (some shorter than a head looks ahead), the
    last row's end padded."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (batch, width), generator=generator)
    starts = torch.rand(batch, width, generator=generator) < 0.2
    doc_ids = starts.long().cumsum(1)
    doc_ids[-1, width - width // 4 :] = -1
    return Window(tokens, doc_ids)


def named_gradients(model: Transformer) -> dict[str, Tensor]:
    """Name -> gradient, zeros where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value (values under 1e-6 count as zero)."""
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()
