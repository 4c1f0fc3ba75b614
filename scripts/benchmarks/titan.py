"""TorchTitan's own step beside ours, where it (v0.2) can be imported; else what it would count."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from benchmarks.gpu_cases import DEVICE, sustained
from benchmarks.report import Rows
from torchtitan_mtp.distributed.activation_checkpoint import _checkpoint_block
from torchtitan_mtp.models.flavors import model_args
from torchtitan_mtp.models.transformer import build_model


def counted_flops(sizes: dict[str, Any], seq_len: int) -> int:
    """FLOPs of a token as TorchTitan v0.2 counts them (`get_dense_model_nparams_and_flops` in its
    models/utils.py): 6 for a parameter that is no embedding, and whole attention, not half."""
    args = model_args(**sizes)
    named = build_model(replace(args, tied_embeddings=False)).named_parameters()
    dense = sum(p.numel() for name, p in named if "embedding" not in name)
    return 6 * dense + 12 * args.n_layers * args.n_heads * args.head_dim * seq_len


def titan_step(sizes: dict[str, Any], batch: int, seq_len: int, dtype: str, seconds: float) -> Rows:
    """A step of TorchTitan's Llama, n = 1: blocks compiled, checkpointed by op, FSDP2 on one rank,
    its loss compiled, clipping and AdamW, as its recipe has them; random tokens."""
    row: dict[str, Any] = {"GFLOP/token, its count": counted_flops(sizes, seq_len) / 1e9}
    try:
        from torchtitan.components.loss import cross_entropy_loss
        from torchtitan.models.llama3 import Transformer, TransformerModelArgs
    except ImportError as error:
        return [{"TorchTitan": f"not importable ({error})"} | row]
    args = model_args(**sizes)
    own = TransformerModelArgs(
        dim=args.dim,
        n_layers=args.n_layers,
        n_heads=args.n_heads,
        n_kv_heads=args.kv_heads,
        vocab_size=args.vocab_size,
        multiple_of=args.multiple_of,
        ffn_dim_multiplier=args.ffn_dim_multiplier,
        rope_theta=args.rope_theta,
        max_seq_len=seq_len,
    )
    with tempfile.TemporaryDirectory() as folder, torch.device(DEVICE):
        backend = "nccl" if DEVICE == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/ranks", rank=0, world_size=1)
        model = _wrapped(Transformer(own), getattr(torch, dtype))
        with torch.no_grad():
            model.init_weights()
        found = sustained(_step(model, torch.compile(cross_entropy_loss), batch, seq_len), seconds)
        dist.destroy_process_group()
    return [{"TorchTitan": "v0.2's model and loss"} | row | {"tokens/s": batch * seq_len / found}]


def _wrapped(model: Any, dtype: torch.dtype) -> Any:
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.layers.values():
        _checkpoint_block(block, by_op=True, early_stop=False)
        block.compile(fullgraph=True)
        fully_shard(block, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def _step(model: Any, loss_of: Any, batch: int, seq_len: int) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=DEVICE == "cuda")
    tokens = torch.randint(model.model_args.vocab_size, (batch, seq_len + 1), device=DEVICE)

    def step() -> None:
        loss = loss_of(model(tokens[:, :-1]), tokens[:, 1:]) / (batch * seq_len)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step
