"""The shape of a decoder-only language model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RoPEScaling:
    """Llama 3.1's frequency scaling for contexts longer than the pre-training's."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


@dataclass(frozen=True)
class ModelArgs:
    """Shapes and constants of a `Transformer`; field names are TorchTitan's.

    `vocab_size = None` leaves the vocabulary to the tokenizer. `hidden_dim` and `head_size` are
    None where they follow from `dim`. `qk_norm`: RMSNorm of each query's and key's head, before it
    is rotated (Qwen3, arXiv 2505.09388).
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    vocab_size: int | None = None
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    hidden_dim: int | None = None
    head_size: int | None = None
    qk_norm: bool = False
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RoPEScaling | None = None
    max_seq_len: int = 2048
    tied_embeddings: bool = False
    attn_mask_type: str = "causal"

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.head_size or self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads: `n_heads` unless grouped (GQA)."""
        return self.n_kv_heads or self.n_heads

    @property
    def ffn_dim(self) -> int:
        """Hidden width of SwiGLU: `hidden_dim`, else 2/3 of 4 * dim, scaled and rounded up."""
        if self.hidden_dim is not None:
            return self.hidden_dim
        hidden = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * -(-hidden // self.multiple_of)
