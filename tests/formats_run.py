"""A run's folder as training leaves it, for tests of formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from small import perturb_norms
from torchtitan_mtp.checkpoint import load_model_weights
from torchtitan_mtp.checkpoint.manifest import MODEL_ONLY, Manifest, write_manifest
from torchtitan_mtp.checkpoint.storage import SummingWriter
from torchtitan_mtp.config import JobConfig, to_toml
from torchtitan_mtp.config.setting import options
from torchtitan_mtp.models.flavors import model_args
from torchtitan_mtp.models.init import init_weights
from torchtitan_mtp.models.transformer import Transformer, build_model
from torchtitan_mtp.mtp import add_heads

SMALL: dict[str, Any] = {
    "model.flavor": "custom",
    "model.vocab_size": 320,
    "model.args.dim": 32,
    "model.args.n_layers": 3,
    "model.args.n_heads": 4,
    "model.args.n_kv_heads": 2,
    "model.args.hidden_dim": 48,
    "training.seq_len": 64,
}
QWEN = SMALL | {"model.name": "qwen3", "model.args.head_size": 12}
QWEN2 = SMALL | {"model.name": "qwen2"}
DEEPSEEK = {
    "model.name": "deepseek_v3",
    "model.flavor": "custom",
    "model.vocab_size": 320,
    "model.args.dim": 32,
    "model.args.n_layers": 4,
    "model.args.n_heads": 4,
    "model.args.hidden_dim": 48,
    "model.args.latent.q_lora_rank": 16,
    "model.args.latent.kv_lora_rank": 12,
    "model.args.latent.qk_nope_head_dim": 10,
    "model.args.latent.qk_rope_head_dim": 6,
    "model.args.latent.v_head_dim": 14,
    "model.args.moe.num_experts": 6,
    "model.args.moe.hidden_dim": 24,
    "model.args.moe.num_expert_groups": 2,
    "model.args.moe.num_limited_groups": 1,
    "model.args.moe.route_scale": 1.5,
    "training.seq_len": 64,
}
PLAIN_QUERIES = {"model.args.latent.q_lora_rank": 0}
YARN = {
    "model.args.rope_scaling.rope_type": "yarn",
    "model.args.rope_scaling.factor": 4.0,
    "model.args.rope_scaling.original_max_seq_len": 16,
    "model.args.rope_scaling.mscale": 0.7,
    "model.args.rope_scaling.mscale_all_dim": 0.9,
}
PARALLEL = {"model.converters": ["mtp"], "mtp.num_future_tokens": 3}
SEQUENTIAL = PARALLEL | {"mtp.heads": "sequential"}
RAW = SEQUENTIAL | {"mtp.trunk_state": "raw"}
LLAMA_3_1 = {"model.args.rope_scaling.factor": 4.0, "model.args.rope_scaling.low_freq_factor": 1.5}


def make_config(**changes: Any) -> JobConfig:
    config, known = JobConfig(), options(JobConfig)
    for name, value in changes.items():
        known[name].set(config, value)
    return config


def make_model(config: JobConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Transformer:
    """Initialised as training does, with uneven norms."""
    args = model_args(
        config.model.name,
        config.model.flavor,
        tokenizer_vocab=259,
        vocab_size=config.model.vocab_size,
        max_seq_len=config.training.seq_len,
        changes=config.model.args.given(),
    )
    model = build_model(args)
    if "mtp" in config.model.converters:
        add_heads(model, config.mtp)
    model.to_empty(device="cpu")
    model.tie_weights()
    init_weights(model, seed)
    perturb_norms(model)
    return model.to(dtype).requires_grad_(False)


def write_run(
    folder: Path, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[Transformer, JobConfig]:
    """config.toml and checkpoint/step-5 of a model, and the model."""
    config = make_config(**changes)
    model = make_model(config, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(to_toml(config))
    step = folder / "checkpoint" / "step-5"
    writer = SummingWriter(step)
    dcp.save(model.state_dict(), storage_writer=writer, no_dist=True)
    write_manifest(step, Manifest(5, MODEL_ONLY, 1, writer.entries))
    return model, config


def weights(path: Path, config: JobConfig) -> dict[str, Tensor]:
    """The state of a fresh model of `config` after loading `path` strictly."""
    model = make_model(config, seed=1)
    load_model_weights(path, model, other_heads=False)
    return model.state_dict()
