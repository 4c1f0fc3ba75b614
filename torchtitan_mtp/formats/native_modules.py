"""The modules for further tokens that released folders hold, and how they lie there: one contract
an architecture.

A module is what `mtp.heads.{k}` is here; contracts differ in names, in what the first one reads of
the trunk, and in which half of the projection's input comes first. Where it says so
(repository@commit:path, of vllm-project/vllm under vllm/model_executor/models):

- DeepSeek-V3, GLM-4.5: @03356f8 deepseek_mtp.py, @028aeda glm4_moe_mtp.py: [emb ; hidden], a layer
  behind the trunk's; transformers 5.23, modeling_layers.py (`MtpLayer`): the same, on
  hidden_states[-1], which is after the final norm. Where vLLM applies a module again, it reads its
  own state from before its norm. DeepSeek-V3.2, too, whose block has an indexer: vLLM's
  `hf_config_override` (vllm/config/speculative.py) takes `deepseek_v32` for `deepseek_v3` there.
- Qwen3-Next, Qwen3.5: @055e47c qwen3_next_mtp.py, @01d9980 qwen3_5_mtp.py: [emb ; hidden], full
  attention, one projection, so one module; @002d607 qwen3_next.py returns the state after the norm.
- Mellum: transformers 5.23, conversion_mapping.py ("MtpModel") and `MtpLayer`: Qwen3-Next's names;
  configuration_mellum.py: one module, of the kinds that `mtp_layer_types` and `mtp_mlp_layer_types`
  say.
- MiMo: @0bb55d6 mimo_mtp.py: [hidden ; emb]; @055e47c mimo.py returns the state before the norm.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from torchtitan_mtp.config import MTP
from torchtitan_mtp.models.args import ModelSpec

_OURS = ("enorm", "hnorm", "eh_proj", "norm")


@dataclass(frozen=True)
class Contract:
    """How modules lie in a folder.

    own, block: what names of a module's own parts and of its block begin with, {} its number, which
    goes on from the trunk's layers if `behind`. parts: theirs for `_OURS`. count: what config.json
    calls their number; most: how many there may be. hidden_first: eh_proj reads [hidden ; emb].
    again: which of its own states a module reads where vLLM applies it again. kinds: keys of
    config.json with what each layer is, which as mtp_{key} have it of modules.
    """

    own: str
    block: str
    parts: tuple[str, str, str, str]
    count: str = "num_nextn_predict_layers"
    behind: bool = False
    trunk_state: Literal["normalized", "raw"] = "normalized"
    hidden_first: bool = False
    most: float = math.inf
    again: Literal["normalized", "raw"] = "normalized"
    kinds: tuple[str, ...] = ()

    def place(self, name: str, layers: int) -> tuple[int, str] | None:
        """Of a tensor on disk beside a trunk of so many layers: its module's number k and its name
        in mtp.heads.{k} (one of `COPIES` as it is); None: of no module."""
        for prefix in (self.block, self.own):
            match = re.match(re.escape(prefix).replace(r"\{\}", r"(\d+)"), name)
            if match is None:
                continue
            k = int(match[1]) - self.behind * layers if match.groups() else 0
            rest = name[match.end() :]
            own = prefix == self.own
            for ours, theirs in zip(_OURS, self.parts, strict=True):
                if own and rest.startswith(f"{theirs}."):
                    return (k, ours + rest[len(theirs) :]) if k >= 0 else None
            return (k, rest if rest in COPIES else f"block.{rest}") if k >= 0 else None
        return None

    def name(self, k: int, part: str, layers: int) -> str:
        """The inverse: on disk, of a name in mtp.heads.{k}."""
        head, _, rest = part.partition(".")
        if head == "block":
            return self.block.format(k + self.behind * layers) + rest
        theirs = self.parts[_OURS.index(head)]
        return f"{self.own.format(k + self.behind * layers)}{theirs}.{rest}"


# What releases say once more in a module, by what it repeats of the trunk.
COPIES = {"embed_tokens.weight": "tok_embeddings", "shared_head.head.weight": "output"}
_LAYER, _MIMO_LAYER = "model.layers.{}.", "model.mtp_layers.{}."
_BEHIND_PARTS = ("enorm", "hnorm", "eh_proj", "shared_head.norm")
_BEHIND = Contract(_LAYER, _LAYER, _BEHIND_PARTS, behind=True, again="raw")
_QWEN_PARTS = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")
_QWEN3_NEXT = Contract("mtp.", "mtp.layers.{}.", _QWEN_PARTS, most=1)
_QWEN3_5 = replace(_QWEN3_NEXT, count="mtp_num_hidden_layers")
_MELLUM = replace(_QWEN3_NEXT, kinds=("layer_types", "mlp_layer_types"))
_MIMO_PARTS = ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm")
_MIMO = Contract(_MIMO_LAYER, _MIMO_LAYER, _MIMO_PARTS, trunk_state="raw", hidden_first=True)

CONTRACTS: dict[str, Contract] = {  # by config.json's architectures
    "DeepseekV3ForCausalLM": _BEHIND,
    "DeepseekV32ForCausalLM": _BEHIND,
    "Glm4MoeForCausalLM": _BEHIND,
    "Qwen3NextForCausalLM": _QWEN3_NEXT,
    "Qwen3_5ForCausalLM": _QWEN3_5,
    "Qwen3_5MoeForCausalLM": _QWEN3_5,
    "Qwen3_5ForConditionalGeneration": _QWEN3_5,  # with vision beside the same language model
    "Qwen3_5MoeForConditionalGeneration": _QWEN3_5,
    "MellumForCausalLM": _MELLUM,
    "MiMoForCausalLM": _MIMO,
}


def architecture_of(spec: ModelSpec) -> str:
    """What the config.json of a trunk of transformers calls its class; "" where it does not."""
    return next(iter((spec.hf_config or {}).get("architectures") or [""]))


def contract_of(spec: ModelSpec) -> Contract | None:
    """Of a trunk of transformers; None where no engine knows modules of it."""
    return CONTRACTS.get(architecture_of(spec))


def heads_in(architecture: str, layers: int, names: Iterable[str]) -> MTP | None:
    """The heads that tensors of these names are, beside a trunk of so many layers; None: none."""
    contract = CONTRACTS[architecture]
    places = [contract.place(name, layers) for name in names]
    if not (modules := {place[0] for place in places if place}):
        return None
    state, n = contract.trunk_state, max(modules) + 2
    return MTP(heads="sequential", num_future_tokens=n, trunk_state=state)


def applied_otherwise(spec: ModelSpec, architecture: str) -> str:
    """What an engine does with the one module of several heads that training did not; or ""."""
    contract, again = CONTRACTS.get(architecture), spec.share_weights and spec.num_future_tokens > 2
    if not again or contract is None or contract.again == "normalized":
        return ""
    return (
        "mtp.share_weights: the module was trained to read its own state after its norm, vLLM's "
        f"{architecture} hands it the one before; look at how often second drafts are accepted"
    )


def misfit(spec: ModelSpec) -> str:
    """Why the heads of a trunk of transformers are no modules of its architecture; or ""."""
    kind, contract = architecture_of(spec), contract_of(spec)
    if contract is None:
        return f"no engine knows modules beside {kind or 'this architecture'}"
    if spec.heads != "sequential":
        return f"modules of {kind} are sequential heads, this model's are {spec.heads} ones"
    if spec.trunk_state != contract.trunk_state:
        return f"modules of {kind} read the trunk's {contract.trunk_state} state (mtp.trunk_state)"
    if spec.num_modules > contract.most:
        return f"{kind} has at most {contract.most:g} module, this model {spec.num_modules}"
    return ""
