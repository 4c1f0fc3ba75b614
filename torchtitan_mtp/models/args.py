"""The sizes of a decoder-only language model and of its heads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal


@dataclass(frozen=True)
class RoPEScaling:
    """Llama 3.1's frequency scaling for contexts longer than the pre-training's."""

    rope_type: ClassVar[Literal["llama3", "yarn"]] = "llama3"
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


@dataclass(frozen=True)
class YaRN:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): rotary frequencies scaled as DeepSeek has it.

    `attention_factor(mscale) / attention_factor(mscale_all_dim)` scales the rotated dimensions
    of queries and keys, and in latent attention `attention_factor(mscale_all_dim)` all of them.
    """

    rope_type: ClassVar[Literal["llama3", "yarn"]] = "yarn"
    factor: float = 40.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0
    original_max_seq_len: int = 4096

    def attention_factor(self, mscale: float) -> float:
        """The square root of 1 / t of equation 22, weighted by `mscale`."""
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


ROPE_SCALINGS: dict[str, type[RoPEScaling] | type[YaRN]] = {"llama3": RoPEScaling, "yarn": YaRN}


@dataclass(frozen=True)
class LatentArgs:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1). What each size is:
    docs/config.md, `[model.args.latent]`."""

    q_lora_rank: int = 0
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True)
class MoEArgs:
    """DeepSeek's mixture of experts (DeepSeek-V3, arXiv 2412.19437, section 2.1.2). What each size
    is: docs/config.md, `[model.args.moe]`. The shared experts are one feed-forward of width
    `num_shared_experts * hidden_dim`; `load_balance_coeff` is the paper's gamma, `aux_loss_coeff`
    its alpha (equations 17 to 20)."""

    num_experts: int = 8
    hidden_dim: int = 256
    num_shared_experts: int = 1
    top_k: int = 2
    n_dense_layers: int = 1
    num_expert_groups: int = 1
    num_limited_groups: int = 1
    score_func: Literal["sigmoid", "softmax"] = "sigmoid"
    route_norm: bool = True
    route_scale: float = 1.0
    load_balance_coeff: float = 1e-3
    aux_loss_coeff: float = 0.0


@dataclass(frozen=True)
class ModelArgs:
    """Shapes and constants of a `Transformer`; field names are TorchTitan's. What each is:
    docs/config.md, `[model.args]`; and beside it, `vocab_size = None` leaves the vocabulary to the
    tokenizer, `hidden_dim` and `head_size` are None where they follow from `dim`, `final_norm_eps`
    is of the trunk's last norm where it is not `norm_eps`."""

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
    qkv_bias: bool = False
    latent: LatentArgs | None = None
    moe: MoEArgs | None = None
    norm_eps: float = 1e-5
    final_norm_eps: float | None = None
    rope_theta: float = 10000.0
    rope_scaling: RoPEScaling | YaRN | None = None
    max_seq_len: int = 2048
    tied_embeddings: bool = False
    attn_mask_type: str = "causal"

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.head_size or self.dim // self.n_heads

    @property
    def rope_dim(self) -> int:
        """How many dimensions of a head are rotated (RoPE)."""
        return self.head_dim if self.latent is None else self.latent.qk_rope_head_dim

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


@dataclass(frozen=True)
class ModelSpec:
    """The sizes of a trunk and its heads, all that defines a model: `model.spec`.

    Attributes:
        args: the trunk's.
        heads: the family ("parallel", ...), or "" for none, where `num_future_tokens` is 1.
        trunk_state: what the first sequential head reads (`mtp.trunk_state`).
        hf_config: of a trunk of transformers its config.json, which defines it; `args` then only
            has its sizes.
    """

    args: ModelArgs
    heads: str = ""
    num_future_tokens: int = 1
    share_weights: bool = False
    trunk_state: Literal["normalized", "raw"] = "normalized"
    hf_config: dict[str, Any] | None = None

    @property
    def num_modules(self) -> int:
        """How many modules the heads 2..n have: one each, or one in all with `share_weights`."""
        further = self.num_future_tokens - 1
        return min(further, 1) if self.share_weights else further

    @property
    def block_type(self) -> str:
        """What its blocks are: "llama" (ordinary attention, dense), "deepseek_v3" (latent
        attention, mixture of experts), or "" for another combination."""
        return {(True, True): "deepseek_v3", (False, False): "llama"}.get(
            (self.args.latent is not None, self.args.moe is not None), ""
        )
