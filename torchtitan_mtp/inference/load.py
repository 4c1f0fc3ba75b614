"""From a checkpoint and the config.toml of its run, or a Hugging Face folder, to a model that can
generate."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from torchtitan_mtp.build import model_from_config
from torchtitan_mtp.checkpoint import find_checkpoint, find_config, load_model_weights
from torchtitan_mtp.checkpoint.record import check_tokenizer, keeps_earlier
from torchtitan_mtp.config import JobConfig, load_toml
from torchtitan_mtp.data.tokenizer import NoTokenizer, Tokenizer, build_tokenizer
from torchtitan_mtp.distributed.mesh import local_device
from torchtitan_mtp.distributed.ranks import Ranks
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats.tokenizer_files import check_rows
from torchtitan_mtp.formats.training import config_of_hf, load_hf_weights
from torchtitan_mtp.models.trunk import Trunk

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


def find_device(name: str | None) -> torch.device:
    """The named device; None: a GPU where there is one, else the CPU. Error: torch
    does not have it or can't use the GPU there is, or it holds no numbers."""
    try:
        device = torch.device(name) if name else local_device()
        if device.type == "meta":
            raise RuntimeError("it has no numbers")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: can't be used: {reason}; try cpu or cuda") from error
    return device


def default_dtype(device: torch.device) -> torch.dtype:
    """What a model decodes in: bfloat16 on a GPU that multiplies it, else float32."""
    gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if gpu else torch.float32


def load_for_inference(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[Trunk, Tokenizer, JobConfig]:
    """The model of a checkpoint with its weights and heads, its tokenizer and its run's config.

    Args:
        path: a step-N folder, a run's folder, or a folder that `export_checkpoint.py` wrote in one
            of the HF formats (or that others did).
        dtype: weights are rounded to it where it is narrower; None: the device's (`default_dtype`).

    Raises:
        UserError: no checkpoint, none that is whole, no config.toml, another's model or tokenizer.
    """
    folder, device = Path(path), torch.device(device)
    dtype = dtype or default_dtype(device)
    is_hf = (folder / "config.json").is_file()
    checkpoint = folder if is_hf else find_checkpoint(path)
    config = config_of_hf(folder) if is_hf else load_toml(find_config(path))
    assets = config.model.hf_assets_path
    tokenizer = build_tokenizer(assets) if assets else NoTokenizer()
    if is_hf:
        check_rows(tokenizer, folder, config.model.vocab_size)
    else:
        check_tokenizer(checkpoint, assets, tokenizer)
    earlier = not is_hf and keeps_earlier(config, checkpoint)
    model = model_from_config(
        config, tokenizer.vocab_size, dtype, min_seq_len=2048, earlier=earlier
    )
    model.to_empty(device=device)
    model.tie_weights()  # to_empty gives each name memory of its own
    model.init_buffers()
    if is_hf:
        load_hf_weights(folder, model, Ranks(alone=True))
    else:
        load_model_weights(checkpoint, model, other_heads=model.mtp is None, allow_cast=True)
    return model.eval().requires_grad_(False), tokenizer, config
