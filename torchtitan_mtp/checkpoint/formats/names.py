"""Which of our tensors is which of theirs: one table a format.

Ours are in Llama's interleaved rotary layout: elements 2j and 2j + 1 of a head turn together.
Hugging Face's models, and TorchTitan's Qwen3, turn elements j and j + head_dim / 2. So the rows of
query and key projections, their biases, and the scales of their norms change places. MiMo's modules
read [h ; emb] where all others, ours included, read [emb ; h]: the halves of that projection's
columns change places. Everything else is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from torchtitan_mtp.checkpoint.formats.spec import ModelSpec


@dataclass(frozen=True)
class Entry:
    """One tensor under both names. `rotary`: its rows are in the layout of rotary positions.
    `swapped`: the halves of its columns are the other way round. `part`: theirs is one of the
    tensors that ours stacks, by its place."""

    ours: str
    theirs: str
    rotary: bool = False
    swapped: bool = False
    part: int | None = None


@dataclass(frozen=True)
class Names:
    """All tensors of one model in one format.

    entries: both ways; zeros: theirs alone, which are zero (shape by name); ignored: theirs alone,
    which say nothing that the others do not.
    """

    entries: list[Entry]
    zeros: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()


def to_halves(x: Tensor, head_dim: int) -> Tensor:
    """Rows [H * head_dim, ...] from interleaved pairs to two halves a head."""
    pairs = x.unflatten(0, (-1, head_dim // 2, 2))  # [H, head_dim / 2, 2, ...]
    return pairs.transpose(1, 2).flatten(0, 2)


def to_pairs(x: Tensor, head_dim: int) -> Tensor:
    """The inverse of `to_halves`."""
    halves = x.unflatten(0, (-1, 2, head_dim // 2))  # [H, 2, head_dim / 2, ...]
    return halves.transpose(1, 2).flatten(0, 2)


def swap_halves(x: Tensor) -> Tensor:
    """[R, 2 * C] with the halves of its columns in each other's place; its own inverse."""
    return x.roll(x.shape[1] // 2, dims=1)


_ROTARY = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
}
_ROTARY_NORMS = {
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
}
_ROTARY_BIASES = {
    "attention.wq.bias": "self_attn.q_proj.bias",
    "attention.wk.bias": "self_attn.k_proj.bias",
}
_ATTENTION = {
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_VALUE_BIAS = {"attention.wv.bias": "self_attn.v_proj.bias"}
FEED_FORWARD = {
    "feed_forward.w1.weight": "gate_proj.weight",
    "feed_forward.w2.weight": "down_proj.weight",
    "feed_forward.w3.weight": "up_proj.weight",
}
_TRUNK = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
GLM_MODULE = {
    "enorm.weight": "enorm.weight",
    "hnorm.weight": "hnorm.weight",
    "eh_proj.weight": "eh_proj.weight",
    "norm.weight": "shared_head.norm.weight",
}
_MELLUM_MODULE = {
    "enorm.weight": "pre_fc_norm_embedding.weight",
    "hnorm.weight": "pre_fc_norm_hidden.weight",
    "eh_proj.weight": "fc.weight",
    "norm.weight": "norm.weight",
}
_MIMO_MODULE = {
    "enorm.weight": "token_layernorm.weight",
    "hnorm.weight": "hidden_layernorm.weight",
    "norm.weight": "final_layernorm.weight",
}


def _block(spec: ModelSpec, ours: str, theirs: str, feed_forward: str = "mlp") -> list[Entry]:
    rotary = _ROTARY | (_ROTARY_NORMS if spec.args.qk_norm else {})
    plain = _ATTENTION | {a: f"{feed_forward}.{b}" for a, b in FEED_FORWARD.items()}
    if spec.args.qkv_bias:
        rotary, plain = rotary | _ROTARY_BIASES, plain | _VALUE_BIAS
    return [
        *(Entry(f"{ours}.{a}", f"{theirs}.{b}", rotary=True) for a, b in rotary.items()),
        *(Entry(f"{ours}.{a}", f"{theirs}.{b}") for a, b in plain.items()),
    ]


def module_entries(table: Mapping[str, str], ours: str, theirs: str) -> list[Entry]:
    """What a module has beside its block."""
    return [Entry(f"{ours}.{a}", f"{theirs}.{b}") for a, b in table.items()]


def trunk_entries(spec: ModelSpec) -> list[Entry]:
    """What a trunk has beside its blocks."""
    tied = spec.args.tied_embeddings
    return [Entry(a, b) for a, b in _TRUNK.items() if not (tied and a == "output.weight")]


def repeated_names(spec: ModelSpec) -> frozenset[str]:
    """What checkpoints may say once more: the tied unembedding, and rotary frequencies."""
    layers = range(spec.args.n_layers)
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in layers}
    return frozenset(frequencies | ({"lm_head.weight"} if spec.args.tied_embeddings else set()))


def llama_hf(spec: ModelSpec) -> Names:
    """LlamaForCausalLM; Qwen2ForCausalLM, whose blocks have biases of queries, keys and values
    more; and Qwen3ForCausalLM, whose blocks have norms of queries and keys more."""
    entries = trunk_entries(spec)
    for i in range(spec.args.n_layers):
        entries += _block(spec, f"layers.{i}", f"model.layers.{i}")
    return Names(entries, ignored=repeated_names(spec))


GLM_EXPERTS = 2  # the router's top-k within a group looks at two


def glm4_moe_hf(spec: ModelSpec) -> Names:
    """Glm4MoeForCausalLM: MTP modules as layers behind the last, their feed-forward and that of the
    last layer as a shared expert beside routed experts that are zero."""
    args, layers = spec.args, spec.args.n_layers
    entries, repeated = trunk_entries(spec), set(repeated_names(spec))
    zeros: dict[str, tuple[int, ...]] = {}
    blocks = [(f"layers.{i}", i) for i in range(layers)]
    blocks += [(f"mtp.heads.{k}.block", layers + k) for k in range(spec.modules)]
    for ours, i in blocks:
        theirs, sparse = f"model.layers.{i}", i >= layers - 1
        entries += _block(spec, ours, theirs, "mlp.shared_experts" if sparse else "mlp")
        if not sparse:
            continue
        zeros[f"{theirs}.mlp.gate.weight"] = (GLM_EXPERTS, args.dim)
        zeros[f"{theirs}.mlp.gate.e_score_correction_bias"] = (GLM_EXPERTS,)
        for e in range(GLM_EXPERTS):
            for name in ("gate_proj", "up_proj"):
                zeros[f"{theirs}.mlp.experts.{e}.{name}.weight"] = (args.ffn_dim, args.dim)
            zeros[f"{theirs}.mlp.experts.{e}.down_proj.weight"] = (args.dim, args.ffn_dim)
    for k in range(spec.modules):
        theirs = f"model.layers.{layers + k}"
        entries += module_entries(GLM_MODULE, f"mtp.heads.{k}", theirs)
        # Released checkpoints repeat the shared embedding and unembedding in every module.
        repeated |= {f"{theirs}.embed_tokens.weight", f"{theirs}.shared_head.head.weight"}
    return Names(entries, zeros, frozenset(repeated))


def mellum_hf(spec: ModelSpec) -> Names:
    """MellumForCausalLM with dense layers: one MTP module under `mtp.`."""
    names = llama_hf(spec)
    if spec.modules:
        names.entries.extend(_block(spec, "mtp.heads.0.block", "mtp.layers.0"))
        names.entries.extend(module_entries(_MELLUM_MODULE, "mtp.heads.0", "mtp"))
    return names


def mimo_hf(spec: ModelSpec) -> Names:
    """MiMoForCausalLM: Qwen2's trunk, and modules under `model.mtp_layers.`."""
    names = llama_hf(spec)
    for k in range(spec.modules):
        ours, theirs = f"mtp.heads.{k}", f"model.mtp_layers.{k}"
        names.entries.extend(_block(spec, f"{ours}.block", theirs))
        names.entries.extend(module_entries(_MIMO_MODULE, ours, theirs))
        names.entries.append(
            Entry(f"{ours}.eh_proj.weight", f"{theirs}.input_proj.weight", swapped=True)
        )
    return names


def meta(spec: ModelSpec) -> Names:
    """facebook/multi-token-prediction: our names but for `extra_heads`."""
    ours = list(spec.shapes())
    entries = [Entry(name, name.replace("mtp.heads.", "extra_heads.")) for name in ours]
    if spec.args.tied_embeddings:  # it has no such thing
        entries.append(Entry("tok_embeddings.weight", "output.weight"))
    return Names(entries, ignored=frozenset({"rope.freqs"}))


def torchtitan(spec: ModelSpec) -> Names:
    """TorchTitan's llama3, deepseek_v3 and qwen3; the last in Hugging Face's rotary layout."""
    rotary = set(_ROTARY | _ROTARY_NORMS) if spec.args.qk_norm else set()
    entries = [Entry(name, name, rotary=name.split(".", 2)[-1] in rotary) for name in spec.shapes()]
    if spec.args.tied_embeddings:
        entries.append(Entry("tok_embeddings.weight", "output.weight"))
    return Names(entries)
