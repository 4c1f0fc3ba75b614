"""Small models and windows for tests."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchtitan_mtp.config import MTP
from torchtitan_mtp.data.targets import Window
from torchtitan_mtp.models.args import LatentArgs, ModelArgs, MoEArgs
from torchtitan_mtp.models.init import copy_full_tensor, init_weights
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

# DeepSeek-V3's parts: one dense block and two of experts in groups, compressed queries.
DEEPSEEK = replace(
    ARGS,
    n_kv_heads=None,
    hidden_dim=24,
    latent=LatentArgs(
        q_lora_rank=8, kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5
    ),
    moe=MoEArgs(
        num_experts=8,
        hidden_dim=8,
        top_k=3,
        num_expert_groups=4,
        num_limited_groups=2,
        route_scale=1.5,
    ),
)


def small_model(
    mtp: MTP | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shape: ModelArgs = ARGS,
    **args: Any,
) -> Transformer:
    """An initialised model on the CPU, with the heads of `mtp`; norm scales are not all one."""
    model = build_model(replace(shape, **args), dtype)
    if mtp is not None:
        add_heads(model, mtp)
    model.to_empty(device="cpu")
    model.tie_weights()
    init_weights(model, seed)
    perturb_norms(model)
    return model


def naive_parameters(model: Transformer) -> dict[str, Tensor]:
    """Copies of a model's parameters, which train where they do, and of the experts' biases."""
    found = {
        name: p.detach().clone().requires_grad_(p.requires_grad)
        for name, p in model.named_parameters()
    }
    biases = {n: b.clone() for n, b in model.named_buffers() if n.endswith(".expert_bias")}
    return found | biases


@torch.no_grad()
def perturb_norms(model: Transformer) -> None:
    """Make norm scales uneven, so that taking the wrong norm, or none, shows. Routers become
    decided, for a tie would be broken by rounding, and biases take part."""
    for name, param in model.named_parameters():
        if param.ndim == 1:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            mean = 0 if name.endswith(".bias") else 1
            value = mean + 0.3 * torch.randn(param.shape, generator=generator)
            copy_full_tensor(param, value.to(param.dtype))
        elif name.endswith("router.gate.weight"):
            param.mul_(50)
        elif name.startswith("mtp.") and name.endswith(".linear.weight"):  # zeros to begin with
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            copy_full_tensor(
                param, 0.3 * torch.randn(param.shape, generator=generator).to(param.dtype)
            )
    for name, moe in model.named_moe_layers():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        moe.expert_bias.copy_(0.1 * torch.randn(moe.expert_bias.shape, generator=generator))


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
