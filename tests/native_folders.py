"""Folders of tiny models with modules for further tokens, in the layouts of released ones.

A module's block is a layer of transformers' own model that is deeper than the folder says, under
the name that the released folder has for it; so its tensors lie as transformers writes them.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_folders import write_folder
from hf_models import CONFIGS, OTHERS

LAYERS = 4


@dataclass(frozen=True)
class Released:
    """family: of `CONFIGS`. own, block: names on disk, with the module's number or its layer's.
    modules: how many tests take at most."""

    family: str
    architecture: str
    own: dict[str, str]
    block: str
    count: str
    raw: bool = False
    hidden_first: bool = False
    model_type: str = ""
    modules: int = 2
    module_kind: str = "full_attention"


_BEHIND = {
    "enorm": "model.layers.{layer}.enorm.weight",
    "hnorm": "model.layers.{layer}.hnorm.weight",
    "eh_proj": "model.layers.{layer}.eh_proj.weight",
    "norm": "model.layers.{layer}.shared_head.norm.weight",
}
_QWEN = {
    "enorm": "mtp.pre_fc_norm_embedding.weight",
    "hnorm": "mtp.pre_fc_norm_hidden.weight",
    "eh_proj": "mtp.fc.weight",
    "norm": "mtp.norm.weight",
}
_MIMO = {
    "enorm": "model.mtp_layers.{k}.token_layernorm.weight",
    "hnorm": "model.mtp_layers.{k}.hidden_layernorm.weight",
    "eh_proj": "model.mtp_layers.{k}.input_proj.weight",
    "norm": "model.mtp_layers.{k}.final_layernorm.weight",
}
_NEXTN, _HIDDEN = "num_nextn_predict_layers", "mtp_num_hidden_layers"
_LAYER, _SINGLE = "model.layers.{layer}.", "mtp.layers.{k}."
RELEASED = {
    "deepseek_v3": Released("deepseek_v3", "DeepseekV3ForCausalLM", _BEHIND, _LAYER, _NEXTN),
    "glm4_moe": Released("glm4_moe", "Glm4MoeForCausalLM", _BEHIND, _LAYER, _NEXTN),
    "qwen3_next": Released("qwen3_next", "Qwen3NextForCausalLM", _QWEN, _SINGLE, _NEXTN, modules=1),
    "qwen3_5": Released("qwen3_5", "Qwen3_5ForCausalLM", _QWEN, _SINGLE, _HIDDEN, modules=1),
    "qwen3_5_moe": Released(
        "qwen3_5_moe", "Qwen3_5MoeForCausalLM", _QWEN, _SINGLE, _HIDDEN, modules=1
    ),
    "mimo": Released(
        "qwen2",
        "MiMoForCausalLM",
        _MIMO,
        "model.mtp_layers.{k}.",
        _NEXTN,
        raw=True,
        hidden_first=True,
        model_type="mimo",
    ),
    "mellum": Released(  # its module slides by default, as config.json need not say
        "mellum",
        "MellumForCausalLM",
        _QWEN,
        _SINGLE,
        _NEXTN,
        modules=1,
        module_kind="sliding_attention",
    ),
}
# Of these transformers has the trunk alone.
ALL = RELEASED | {
    "deepseek_v32": Released("deepseek_v32", "DeepseekV32ForCausalLM", _BEHIND, _LAYER, _NEXTN)
}


def write_native(
    folder: Path, name: str, modules: int = 1, dtype: torch.dtype = torch.float32
) -> Any:
    """Two shards of a trunk and one of modules; transformers' deeper model."""
    kind = ALL[name]
    deep = folder.with_name(f"{folder.name}_deeper")
    config, changes = (CONFIGS | OTHERS)[kind.family](), {}
    for key, of_modules in (("layer_types", kind.module_kind), ("mlp_layer_types", "sparse")):
        if types := getattr(config, key, None):
            changes[key] = [*types, *[of_modules] * modules]
    write_folder(deep, kind.family, num_hidden_layers=LAYERS + modules, **changes)
    model = transformers.AutoModelForCausalLM.from_pretrained(deep, dtype=dtype)
    tensors = {key: t.to(dtype) for key, t in load_file(deep / "model.safetensors").items()}
    native: dict[str, Tensor] = {}
    width = model.config.hidden_size
    for k in range(modules):
        numbers = {"k": k, "layer": LAYERS + k}
        theirs, place = f"model.layers.{LAYERS + k}.", kind.block.format(**numbers)
        for key in [key for key in tensors if key.startswith(theirs)]:
            native[place + key.removeprefix(theirs)] = tensors.pop(key)
        for part, where in kind.own.items():
            shape = (width, 2 * width) if part == "eh_proj" else (width,)
            value = torch.randn(shape) * 0.1 + (part != "eh_proj")
            native[where.format(**numbers)] = value.to(dtype)
    shutil.copytree(deep, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    write_shards(folder, tensors, native)
    told = json.loads((folder / "config.json").read_text())
    told |= {"num_hidden_layers": LAYERS, kind.count: modules, "architectures": [kind.architecture]}
    told |= {"dtype": str(dtype).removeprefix("torch.")}
    told |= {key: told[key][:LAYERS] for key in changes}
    if kind.model_type:
        told["model_type"] = kind.model_type
    (folder / "config.json").write_text(json.dumps(told, indent=2))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return model


def write_shards(folder: Path, trunk: dict[str, Tensor], native: dict[str, Tensor]) -> None:
    """Two files of the trunk, one of what is native, and the index."""
    names = sorted(trunk)
    half = len(names) // 2
    parts = [{n: trunk[n] for n in names[:half]}, {n: trunk[n] for n in names[half:]}, native]
    places: dict[str, str] = {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05}-of-{len(parts):05}.safetensors"
        save_file(part, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    size = sum(t.nbytes for part in parts for t in part.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All of a folder's safetensors files."""
    return {
        k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()
    }
