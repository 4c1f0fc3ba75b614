"""Tiny models of transformers' families, by their configs, for tests of trunks that are theirs."""

from collections.abc import Callable
from typing import Any

import transformers

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "head_dim": 8,
}
_SLIDING, _FULL = "sliding_attention", "full_attention"


def _make(name: str, **changes: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**_SIZES | changes)


_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": _make("LlamaConfig"),
    "llama_tied": _make("LlamaConfig", tie_word_embeddings=True),
    "mistral": _make("MistralConfig", head_dim=8, sliding_window=None),
    "mistral_sliding": _make("MistralConfig", head_dim=8, sliding_window=5),
    "qwen2": _make("Qwen2Config"),
    "qwen3": _make("Qwen3Config", head_dim=8),
    "qwen3_moe": _make("Qwen3MoeConfig", head_dim=8, decoder_sparse_step=1, **_EXPERTS),
    "gemma2": _make("Gemma2Config", head_dim=8, sliding_window=5, query_pre_attn_scalar=8),
    # The last layer slides, and heads copy the second one.
    "gemma3": _make(
        "Gemma3TextConfig",
        head_dim=8,
        sliding_window=5,
        query_pre_attn_scalar=8,
        layer_types=[_SLIDING, _FULL, _SLIDING, _SLIDING],
    ),
    "phi3": _make("Phi3Config"),
    "olmo2": _make("Olmo2Config"),
    "smollm3": _make("SmolLM3Config", no_rope_layers=[1, 1, 1, 0]),
    "granite": _make(
        "GraniteConfig",
        embedding_multiplier=12.0,
        logits_scaling=8.0,
        residual_multiplier=0.22,
        attention_multiplier=0.1,
    ),
    "gpt_oss": _make(
        "GptOssConfig",
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=5,
        layer_types=[_SLIDING, _FULL] * 2,
    ),
    "glm4_moe": _make("Glm4MoeConfig", head_dim=8, **_DEEPSEEK),
    "qwen3_next": _make(
        "Qwen3NextConfig", shared_expert_intermediate_size=16, **_EXPERTS, **_LINEAR
    ),
    "qwen3_5": _make("Qwen3_5TextConfig", **_LINEAR),
    "qwen3_5_moe": _make(
        "Qwen3_5MoeTextConfig", shared_expert_intermediate_size=16, **_EXPERTS, **_LINEAR
    ),
    "deepseek_v3": _make("DeepseekV3Config", **_DEEPSEEK, **_LATENT),
    "mellum": _make(
        "MellumConfig", head_dim=8, sliding_window=5, layer_types=[_SLIDING, _FULL] * 2, **_EXPERTS
    ),
    "cohere": _make("CohereConfig"),
    "starcoder2": _make("Starcoder2Config"),
    "olmo3": _make("Olmo3Config", sliding_window=5),
    "mixtral": _make("MixtralConfig", num_local_experts=4, sliding_window=None),
    "nemotron": _make("NemotronConfig"),
    "stablelm": _make("StableLmConfig"),
}
# Families that few tests need: others with a part, or a name of a part, of their own.
OTHERS: dict[str, Callable[[], Any]] = {
    "deepseek_v32": _make(  # so many indexers that no two positions tie
        "DeepseekV32Config",
        **_DEEPSEEK,
        **_LATENT,
        index_topk=6,
        index_n_heads=16,
        index_head_dim=8,
    ),
    "gpt_neox": _make("GPTNeoXConfig", num_key_value_heads=4),
}
