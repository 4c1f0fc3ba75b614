"""Rotary positions (Su et al. 2021, arXiv 2104.09864) in Llama's interleaved layout."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from torchtitan_mtp.models.args import ModelArgs, RoPEScaling, YaRN


def rope_tables(args: ModelArgs, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """cos, sin of every position: [max_seq_len, rope_dim / 2] float32."""
    half = torch.arange(0, args.rope_dim, 2, dtype=torch.float32, device=device)
    freqs = 1.0 / args.rope_theta ** (half / args.rope_dim)  # [rope_dim / 2]
    magnitude = 1.0
    if isinstance(scaling := args.rope_scaling, RoPEScaling):
        freqs = _llama(freqs, scaling)
    elif scaling is not None:
        freqs = _yarn(freqs, scaling, args.rope_theta)
        magnitude = scaling.attention_factor(scaling.mscale)
        magnitude /= scaling.attention_factor(scaling.mscale_all_dim)
    positions = torch.arange(args.max_seq_len, dtype=torch.float32, device=device)
    angles = torch.outer(positions, freqs)  # [max_seq_len, rope_dim / 2]
    return magnitude * angles.cos(), magnitude * angles.sin()


def rope_mismatch(table: Tensor, args: ModelArgs) -> float:
    """Largest difference between the logarithms of another program's rotary frequencies and
    ours; 0.0 where rounding to half precision may explain it.

    table: [rope_dim / 2] of them, or TorchTitan's complex exp(i * position * frequency),
        [positions, rope_dim / 2].
    """
    found = torch.atleast_1d(table)[1:2].angle().flatten() if table.is_complex() else table
    cos, sin = rope_tables(replace(args, max_seq_len=2), "cpu")
    angles = torch.atan2(sin[1], cos[1])  # of position 1
    if found.shape != angles.shape:
        return math.inf
    far = (found.double().log() - angles.double().log()).abs().max().item()
    return 0.0 if far <= 0.05 else far


def _llama(freqs: Tensor, scaling: RoPEScaling) -> Tensor:
    """Frequencies whose wavelength exceeds the old context are divided by `factor`, those well
    inside it stay, the ones between are interpolated."""
    old = scaling.original_max_seq_len
    wavelength = 2 * math.pi / freqs
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = ((old / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * freqs / scaling.factor + smooth * freqs


def _yarn(freqs: Tensor, scaling: YaRN, theta: float) -> Tensor:
    """Section 3.2 of the paper, with DeepSeek's ramp over pairs, whose ends are whole numbers.

    Pairs that turn more than `beta_fast` times within the old context stay, those that turn less
    than `beta_slow` times are divided by `factor`, the ones between are interpolated.
    """
    width = 2 * len(freqs)

    def pair_with_turns(turns: float) -> float:
        period = scaling.original_max_seq_len / (turns * 2 * math.pi)
        return width * math.log(period) / (2 * math.log(theta))

    low = max(math.floor(pair_with_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with_turns(scaling.beta_slow)), width - 1)
    pairs = torch.arange(len(freqs), dtype=torch.float32, device=freqs.device)
    divided = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    return divided * freqs / scaling.factor + (1 - divided) * freqs


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[2j], x[2j+1]) of x [B, S, H, hd] by their position's angle."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [B, S, H, hd/2] each
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).type_as(x)
