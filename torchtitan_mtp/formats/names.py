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

from torch import Size, Tensor

from torchtitan_mtp.build import parameter_shapes
from torchtitan_mtp.models.args import ModelSpec


@dataclass(frozen=True)
class Entry:
    """One tensor under both names, with the shape of ours. `rotary`: its rows are in the layout of
    rotary positions. `swapped`: the halves of its columns are the other way round. `stacked`: ours
    stacks those of theirs, else there is one."""

    ours: str
    shape: Size
    theirs: tuple[str, ...]
    rotary: bool = False
    swapped: bool = False
    stacked: bool = False

    @property
    def their_shape(self) -> Size:
        return Size(self.shape[1:]) if self.stacked else self.shape


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
    return x.roll(x.shape[-1] // 2, dims=-1)


# Words of our names and of theirs; and those of the parts of an MTP module.
_TRUNK = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_ATTENTION = {"attention": "self_attn", "wq": "q_proj", "wk": "k_proj", "wv": "v_proj"}
_FEED_FORWARD = {"feed_forward": "mlp", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
WORDS = {**_TRUNK, **_NORMS, **_ATTENTION, "wo": "o_proj", **_FEED_FORWARD}
_GLM_MODULE = {"block": "", "norm": "shared_head.norm"}
_MELLUM_MODULE = {
    "block": "layers.0",
    "enorm": "pre_fc_norm_embedding",
    "hnorm": "pre_fc_norm_hidden",
    "eh_proj": "fc",
}
_MIMO_MODULE = {
    "block": "",
    "enorm": "token_layernorm",
    "hnorm": "hidden_layernorm",
    "eh_proj": "input_proj",
    "norm": "final_layernorm",
}
_ROTARY = {"wq", "wk", "q_norm", "k_norm"}  # of blocks of Llama's kind
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def hf_entries(
    spec: ModelSpec,
    module: Mapping[str, str] = _GLM_MODULE,
    place: str = "model.layers.{layer}",
    words: Mapping[str, str] = WORDS,
) -> list[Entry]:
    """Every tensor of a model, under the name that it has in Hugging Face's families. place: of MTP
    module k, which is layer `layer` where modules are layers behind the last, as GLM's."""
    entries = []
    for ours, shape in parameter_shapes(spec).items():
        theirs, parts = [], ours.split(".")
        if parts[0] == "layers":
            theirs, parts = ["model", *parts[:2]], parts[2:]
        elif parts[0] == "mtp":
            k, part, parts = int(parts[2]), parts[3], parts[4:]
            theirs = [place.format(k=k, layer=spec.args.n_layers + k), module.get(part, part)]
        theirs += [words.get(part, part) for part in parts]
        rotary = spec.block_type == "llama" and not _ROTARY.isdisjoint(parts)
        entries.append(Entry(ours, shape, (".".join(filter(None, theirs)),), rotary))
    return entries


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
    return Names(hf_entries(spec), repeats=repeats_of(spec))


GLM_EXPERTS = 2  # the router's top-k within a group looks at two


def glm4_moe_hf(spec: ModelSpec) -> Names:
    """Glm4MoeForCausalLM: MTP modules as layers behind the last, their feed-forward and that of the
    last layer as a shared expert beside routed experts that are zero."""
    args, layers = spec.args, spec.args.n_layers
    entries = hf_entries(spec)
    zeros: dict[str, tuple[int, ...]] = {}
    for i in range(layers - 1, layers + spec.num_modules):
        mlp = f"model.layers.{i}.mlp"
        for at, entry in enumerate(entries):
            if entry.theirs[0].startswith(f"{mlp}."):
                shared = entry.theirs[0].replace(mlp, f"{mlp}.shared_experts")
                entries[at] = replace(entry, theirs=(shared,))
        zeros[f"{mlp}.gate.weight"] = (GLM_EXPERTS, args.dim)
        zeros[f"{mlp}.gate.e_score_correction_bias"] = (GLM_EXPERTS,)
        for e in range(GLM_EXPERTS):
            for name in ("gate_proj", "up_proj"):
                zeros[f"{mlp}.experts.{e}.{name}.weight"] = (args.ffn_dim, args.dim)
            zeros[f"{mlp}.experts.{e}.down_proj.weight"] = (args.dim, args.ffn_dim)
    return Names(entries, zeros, repeats_of(spec, behind=True))


def mellum_hf(spec: ModelSpec) -> Names:
    """MellumForCausalLM with dense layers: one MTP module under `mtp.`."""
    return Names(hf_entries(spec, _MELLUM_MODULE, "mtp"), repeats=repeats_of(spec))


def mimo_hf(spec: ModelSpec) -> Names:
    """MiMoForCausalLM: Qwen2's trunk, and modules under `model.mtp_layers.`."""
    entries = hf_entries(spec, _MIMO_MODULE, "model.mtp_layers.{k}")
    entries = [replace(entry, swapped=".eh_proj." in entry.ours) for entry in entries]
    return Names(entries, repeats=repeats_of(spec))


def medusa(spec: ModelSpec) -> Names:
    """vLLM's MedusaModel: light heads and the one `lm_head` that they share, no trunk."""
    unembedding = "tok_embeddings" if spec.args.tied_embeddings else "output"
    theirs = {f"{unembedding}.weight": HEAD}
    for k in range(spec.num_modules):
        theirs[f"mtp.heads.{k}.linear.weight"] = f"blocks.{k}.layers.0.weight"
    shapes = parameter_shapes(spec)
    return Names([Entry(ours, shapes[ours], (name,)) for ours, name in theirs.items()])


def torchtitan(spec: ModelSpec) -> Names:
    """TorchTitan's llama3, deepseek_v3 and qwen3; the last in Hugging Face's rotary layout."""
    turned = _ROTARY if spec.args.qk_norm else set()
    entries = [
        Entry(name, shape, (name,), not turned.isdisjoint(name.split(".")))
        for name, shape in parameter_shapes(spec).items()
    ]
    # It ties nothing.
    copies = {"output.weight": "tok_embeddings.weight"} if spec.args.tied_embeddings else {}
    return Names(entries, repeats={"freqs_cis": FREQUENCIES}, copies=copies)


def meta(spec: ModelSpec) -> Names:
    """facebook/multi-token-prediction: our names but for `extra_heads`."""
    same = torchtitan(spec)
    theirs = [entry.ours.replace("mtp.heads.", "extra_heads.") for entry in same.entries]
    entries = [replace(e, theirs=(name,)) for e, name in zip(same.entries, theirs, strict=True)]
    return replace(same, entries=entries, repeats={"rope.freqs": FREQUENCIES})
