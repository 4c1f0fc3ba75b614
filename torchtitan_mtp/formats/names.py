"""Which of our tensors is which of theirs: one table a format.

Ours are in Llama's interleaved rotary layout: elements 2j and 2j + 1 of a head turn together.
Hugging Face's models, and TorchTitan's Qwen3, turn elements j and j + head_dim / 2. So the rows of
query and key projections, their biases, and the scales of their norms change places. MiMo's modules
read [h ; emb] where all others, ours included, read [emb ; h]: the halves of that projection's
columns change places. Everything else is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from torchtitan_mtp.build import parameter_shapes
from torchtitan_mtp.models.args import ModelSpec


@dataclass(frozen=True)
class Entry:
    """One tensor under both names. `rotary`: its rows are in the layout of rotary positions.
    `swapped`: the halves of its columns are the other way round. `stacked`: ours stacks those of
    theirs, else there is one."""

    ours: str
    theirs: tuple[str, ...]
    rotary: bool = False
    swapped: bool = False
    stacked: bool = False


@dataclass(frozen=True)
class Names:
    """All tensors of one model in one format.

    entries: both ways; zeros: theirs alone, which are zero (shape by name); repeats: theirs alone,
    which may be there, and what each is then equal to: another of theirs, or FREQUENCIES. copies:
    such repeats as are written as well.
    """

    entries: list[Entry]
    zeros: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    repeats: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)


FREQUENCIES = "the rotary frequencies"  # by the model's arguments


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


# Modules of ours and of theirs, by what stands behind a common beginning of their names.
_ROTARY = {"wq": "q_proj", "wk": "k_proj"}
_ROTARY_NORMS = {"q_norm": "q_norm", "k_norm": "k_norm"}
NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
FEED_FORWARD = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_TRUNK = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GLM_MODULE = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "norm": "shared_head.norm"}
_MELLUM_MODULE = {
    "enorm": "pre_fc_norm_embedding",
    "hnorm": "pre_fc_norm_hidden",
    "eh_proj": "fc",
    "norm": "norm",
}
_MIMO_MODULE = {"enorm": "token_layernorm", "hnorm": "hidden_layernorm", "norm": "final_layernorm"}


def entries_of(
    table: Mapping[str, str], ours: str, theirs: str, what: str = "weight", rotary: bool = False
) -> list[Entry]:
    """The modules of a table, each with a tensor `what`. ours, theirs: their names' beginnings."""
    return [Entry(f"{ours}{a}.{what}", (f"{theirs}{b}.{what}",), rotary) for a, b in table.items()]


def _block(spec: ModelSpec, ours: str, theirs: str, feed_forward: str = "mlp") -> list[Entry]:
    attention = f"{ours}.attention.", f"{theirs}.self_attn."
    entries = entries_of(_ROTARY, *attention, rotary=True)
    if spec.args.qk_norm:
        entries += entries_of(_ROTARY_NORMS, *attention, rotary=True)
    if spec.args.qkv_bias:
        entries += entries_of(_ROTARY, *attention, "bias", rotary=True)
    entries += entries_of({"wv": "v_proj", "wo": "o_proj"}, *attention)
    entries += entries_of(NORMS, f"{ours}.", f"{theirs}.")
    entries += entries_of(FEED_FORWARD, f"{ours}.feed_forward.", f"{theirs}.{feed_forward}.")
    if spec.args.qkv_bias:
        entries += entries_of({"wv": "v_proj"}, *attention, "bias")
    return entries


def trunk_entries(spec: ModelSpec) -> list[Entry]:
    """What a trunk has beside its blocks."""
    entries = entries_of(_TRUNK, "", "")
    return entries[:-1] if spec.args.tied_embeddings else entries


def repeats_of(spec: ModelSpec, behind: bool = False) -> dict[str, str]:
    """What checkpoints may say once more: the tied unembedding, and rotary frequencies. behind:
    modules are layers behind the last, with copies of the shared embedding and unembedding."""
    layers, tied = spec.args.n_layers, spec.args.tied_embeddings
    last = layers + spec.num_modules if behind else layers
    repeats = {HEAD: EMBEDDING} if tied else {}
    for i in range(last):
        repeats[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = FREQUENCIES
    for i in range(layers, last):
        repeats[f"model.layers.{i}.embed_tokens.weight"] = EMBEDDING
        repeats[f"model.layers.{i}.shared_head.head.weight"] = EMBEDDING if tied else HEAD
    return repeats


def llama_hf(spec: ModelSpec) -> Names:
    """LlamaForCausalLM; Qwen2ForCausalLM, whose blocks have biases of queries, keys and values
    more; and Qwen3ForCausalLM, whose blocks have norms of queries and keys more."""
    entries = trunk_entries(spec)
    for i in range(spec.args.n_layers):
        entries += _block(spec, f"layers.{i}", f"model.layers.{i}")
    return Names(entries, repeats=repeats_of(spec))


GLM_EXPERTS = 2  # the router's top-k within a group looks at two


def glm4_moe_hf(spec: ModelSpec) -> Names:
    """Glm4MoeForCausalLM: MTP modules as layers behind the last, their feed-forward and that of the
    last layer as a shared expert beside routed experts that are zero."""
    args, layers = spec.args, spec.args.n_layers
    entries = trunk_entries(spec)
    zeros: dict[str, tuple[int, ...]] = {}
    blocks = [(f"layers.{i}", i) for i in range(layers)]
    blocks += [(f"mtp.heads.{k}.block", layers + k) for k in range(spec.num_modules)]
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
    for k in range(spec.num_modules):
        entries += entries_of(GLM_MODULE, f"mtp.heads.{k}.", f"model.layers.{layers + k}.")
    return Names(entries, zeros, repeats_of(spec, behind=True))


def mellum_hf(spec: ModelSpec) -> Names:
    """MellumForCausalLM with dense layers: one MTP module under `mtp.`."""
    names = llama_hf(spec)
    if spec.num_modules:
        names.entries.extend(_block(spec, "mtp.heads.0.block", "mtp.layers.0"))
        names.entries.extend(entries_of(_MELLUM_MODULE, "mtp.heads.0.", "mtp."))
    return names


def mimo_hf(spec: ModelSpec) -> Names:
    """MiMoForCausalLM: Qwen2's trunk, and modules under `model.mtp_layers.`."""
    names = llama_hf(spec)
    for k in range(spec.num_modules):
        ours, theirs = f"mtp.heads.{k}", f"model.mtp_layers.{k}"
        names.entries.extend(_block(spec, f"{ours}.block", theirs))
        names.entries.extend(entries_of(_MIMO_MODULE, f"{ours}.", f"{theirs}."))
        joined = (f"{theirs}.input_proj.weight",)
        names.entries.append(Entry(f"{ours}.eh_proj.weight", joined, swapped=True))
    return names


def torchtitan(spec: ModelSpec) -> Names:
    """TorchTitan's llama3, deepseek_v3 and qwen3; the last in Hugging Face's rotary layout."""
    turned = _ROTARY | _ROTARY_NORMS if spec.args.qk_norm else {}
    rotary = {f"attention.{name}.weight" for name in turned}
    entries = [
        Entry(name, (name,), name.split(".", 2)[-1] in rotary) for name in parameter_shapes(spec)
    ]
    # It ties nothing.
    copies = {"output.weight": "tok_embeddings.weight"} if spec.args.tied_embeddings else {}
    return Names(entries, repeats={"freqs_cis": FREQUENCIES}, copies=copies)


def meta(spec: ModelSpec) -> Names:
    """facebook/multi-token-prediction: our names but for `extra_heads`."""
    same = torchtitan(spec)
    entries = [Entry(e.ours, (e.ours.replace("mtp.heads.", "extra_heads."),)) for e in same.entries]
    return replace(same, entries=entries, repeats={"rope.freqs": FREQUENCIES})
