"""Tables about what is trained: the model, its sizes and its converters."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torchtitan_mtp.config.setting import setting


@dataclass
class RoPEScalingArgs:
    """Scaling of rotary frequencies for contexts longer than the pre-training's, over the flavor's.
    A key left out is the flavor's, or its default."""

    rope_type: Literal["llama3", "yarn"] | None = None
    """Llama 3.1's scaling, or YaRN (arXiv 2309.00071) as DeepSeek has it; None: of the flavor's
    kind, and "llama3" where it has none."""

    factor: float | None = setting(None, at_least=1)
    """Divisor of the frequencies whose wavelength exceeds the old context; 1: no scaling."""

    original_max_seq_len: int | None = setting(None, at_least=1)
    """Context of the pre-training, in tokens; default 8192, of "yarn" 4096."""

    low_freq_factor: float | None = setting(None, above=0)
    """"llama3": original_max_seq_len over this: wavelengths from there on are divided in full;
    default 1."""

    high_freq_factor: float | None = setting(None, above=0)
    """"llama3": original_max_seq_len over this: wavelengths up to there stay; default 4."""

    beta_fast: float | None = setting(None, above=0)
    """"yarn": pairs that turn more often than this in the old context stay; default 32."""

    beta_slow: float | None = setting(None, above=0)
    """"yarn": pairs that turn less often than this in the old context are divided in full;
    default 1."""

    mscale: float | None = setting(None, at_least=0)
    """"yarn": weight of the growth of rotated queries and keys with the factor; default 1."""

    mscale_all_dim: float | None = setting(None, at_least=0)
    """"yarn": weight of that growth in all their dimensions; default 1."""


@dataclass
class LatentArgs:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), over the flavor's sizes; setting
    any of them puts it in place of heads of keys and values."""

    q_lora_rank: int | None = setting(None, at_least=0, at_most=10**6)
    """Width that queries are compressed to; 0: they are not."""

    kv_lora_rank: int | None = setting(None, at_least=1, at_most=10**6)
    """Width that keys and values are compressed to."""

    qk_nope_head_dim: int | None = setting(None, at_least=1, at_most=10**6)
    """Dimensions of a head's query and key without positions."""

    qk_rope_head_dim: int | None = setting(None, at_least=2, at_most=10**6)
    """Rotated dimensions of a head's query and of the key that all heads share."""

    v_head_dim: int | None = setting(None, at_least=1, at_most=10**6)
    """Dimensions of a head's value."""


@dataclass
class MoEArgs:
    """Mixtures of experts (DeepSeek-V3, arXiv 2412.19437), over the flavor's sizes; setting any of
    these keys puts them in place of dense feed-forwards."""

    num_experts: int | None = setting(None, at_least=1, at_most=10_000)
    """Routed experts of a block."""

    hidden_dim: int | None = setting(None, at_least=1, at_most=10**6)
    """Width of an expert."""

    num_shared_experts: int | None = setting(None, at_least=0, at_most=10_000)
    """Experts that every token goes to."""

    top_k: int | None = setting(None, at_least=1)
    """Routed experts that a token goes to."""

    n_dense_layers: int | None = setting(None, at_least=0)
    """First blocks that keep a dense feed-forward."""

    num_expert_groups: int | None = setting(None, at_least=1)
    """Groups of experts."""

    num_limited_groups: int | None = setting(None, at_least=1)
    """Groups that a token's experts are chosen from."""

    score_func: Literal["sigmoid", "softmax"] | None = None
    """How the router's logits become scores."""

    route_norm: bool | None = None
    """Whether the weights of a token's experts are made to sum to one."""

    route_scale: float | None = setting(None, above=0)
    """Factor of these weights."""

    load_balance_coeff: float | None = setting(None, at_least=0)
    """What the bias of an expert with too many or too few tokens moves by after a step; 0: none
    moves."""

    aux_loss_coeff: float | None = setting(None, at_least=0)
    """Factor of the sequence-wise balance loss; it counts in gradients, not in logged losses."""


@dataclass
class ModelArgs:
    """Sizes to set over the flavor's; a key left out is the flavor's."""

    dim: int | None = setting(None, at_least=1, at_most=10**6)
    """Width of the model."""

    n_layers: int | None = setting(None, at_least=1, at_most=10_000)
    """Transformer blocks of the trunk."""

    n_heads: int | None = setting(None, at_least=1, at_most=10**5)
    """Attention heads."""

    n_kv_heads: int | None = setting(None, at_least=1, at_most=10**5)
    """Key-value heads, a divisor of n_heads."""

    head_size: int | None = setting(None, at_least=2, at_most=10**6)
    """Width of one attention head; where the flavor has none either: dim / n_heads."""

    hidden_dim: int | None = setting(None, at_least=1, at_most=10**6)
    """Width of the feed-forward layer."""

    norm_eps: float | None = setting(None, above=0)
    """Epsilon of every RMSNorm."""

    rope_theta: float | None = setting(None, above=0)
    """Base of the rotary frequencies."""

    tied_embeddings: bool | None = None
    """Whether the embedding is also the unembedding."""

    qk_norm: bool | None = None
    """Whether the heads of queries and keys are normalised (Qwen3)."""

    qkv_bias: bool | None = None
    """Whether the projections to queries, keys and values have biases (Qwen2)."""

    rope_scaling: RoPEScalingArgs = field(default_factory=RoPEScalingArgs)
    latent: LatentArgs = field(default_factory=LatentArgs)
    moe: MoEArgs = field(default_factory=MoEArgs)

    def given(self) -> dict[str, Any]:
        """What is set, by name; of a table a dict of the keys that are set, if any."""
        return _given(asdict(self))


def _given(values: dict[str, Any]) -> dict[str, Any]:
    found = {k: _given(v) if isinstance(v, dict) else v for k, v in values.items()}
    return {key: value for key, value in found.items() if value is not None and value != {}}


@dataclass
class Model:
    """The model before and after its converters."""

    name: str = "llama3"
    """Model family; "hf": the model in the folder model.hf_assets_path, run by transformers."""

    flavor: str = "debugmodel"
    """Size within the family; "custom" where [model.args] gives all of them."""

    hf_assets_path: str = setting("byte", path=True, also_named=("model.tokenizer_path",))
    """Tokenizer: a folder with Hugging Face's files, a tokenizer file, or the word "byte"; with
    model.name = "hf" also the model's config.json, and its weights (initial_load_in_hf)."""

    vocab_size: int | None = setting(None, at_least=1)
    """Rows of the embedding; None: the flavor's, or the tokenizer's where the flavor is open."""

    attn_mask_type: Literal["causal", "block_causal"] | None = None
    """Whether a token sees all earlier tokens, or only those of its own document; None: the
    flavor's ("causal" but for deepseek_v3's 16B and 671B)."""

    attn_type: Literal["flex", "varlen"] = "flex"
    """How "block_causal" runs on GPUs: FlexAttention; or FlashAttention over documents one behind
    another, in bfloat16 and float16. "varlen" has not been measured yet."""

    flash_attn_impl: Literal["FA2", "FA3", "FA4"] = "FA2"
    """What stands for FlashAttention: torch's own, or the packages of FlashAttention-3 (Hopper) or
    -4 (Blackwell), by torch.nn.attention.activate_flash_attention_impl. Not measured yet."""

    converters: list[Literal["mtp", "quantize.linear.float8"]] = setting(
        list,
        distinct=True,
        also_spelled={"float8": "quantize.linear.float8"},
    )
    """Changes applied to the model, in order: "mtp" adds the heads of [mtp],
    "quantize.linear.float8" (or "float8") trains its linear layers in float8."""

    print_after_conversion: bool = False
    """Print the model after its converters were applied."""

    args: ModelArgs = field(default_factory=ModelArgs)
