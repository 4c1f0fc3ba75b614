"""The formats that there are, and what all of them share."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Size

from torchtitan_mtp.checkpoint.folders import find_checkpoint
from torchtitan_mtp.checkpoint.load import names_line
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats import configs, deepseek_v3, names
from torchtitan_mtp.formats.configs import Reader
from torchtitan_mtp.formats.fp8 import without_quantization
from torchtitan_mtp.formats.names import FREQUENCIES, HEAD, Names
from torchtitan_mtp.formats.read import (
    Tensors,
    dcp_tensors,
    difference,
    hf_tensors,
    meta_tensors,
)
from torchtitan_mtp.formats.write import DTYPES
from torchtitan_mtp.models.args import ModelArgs, ModelSpec
from torchtitan_mtp.models.rope import rope_mismatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Format:
    """One format.

    architecture: what its config.json names; also: another that is read as this one. Without
    read_config its folders do not say which model they hold. container: "safetensors", "pth" or
    "dcp". kind: the `ModelSpec.block_type` that it holds, None for any. heads: the family
    that it holds, if any, most_modules how many of them, and trunk_state what the first of
    sequential ones reads. qk_norm, qkv_bias: what it needs, None for either.
    """

    names: Callable[[ModelSpec], Names]
    architecture: str
    write_config: Callable[[ModelSpec], dict[str, Any]]
    read_config: Callable[[Reader], ModelArgs] | None = None
    container: str = "safetensors"
    kind: str | None = "llama"
    heads: str = ""
    most_modules: float = math.inf
    trunk_state: Literal["normalized", "raw"] = "normalized"
    qk_norm: bool | None = None
    qkv_bias: bool | None = False
    also: str = ""


def _dense(
    architecture: str, model_type: str, qk_norm: bool = False, qkv_bias: bool = False
) -> Format:
    write = partial(configs.dense_config, architecture, model_type)
    read = partial(configs.read_dense, qk_norm=qk_norm, qkv_bias=qkv_bias)
    form = Format(names.llama_hf, architecture, write, read)
    return replace(form, qk_norm=qk_norm, qkv_bias=qkv_bias)


# (`hf_format` takes the first that holds a model.)
FORMATS: dict[str, Format] = {
    "llama_hf": replace(_dense("LlamaForCausalLM", "llama"), also="MistralForCausalLM"),
    "qwen2_hf": _dense("Qwen2ForCausalLM", "qwen2", qkv_bias=True),
    "qwen3_hf": _dense("Qwen3ForCausalLM", "qwen3", qk_norm=True),
    "glm4_moe_hf": Format(
        *(names.glm4_moe_hf, "Glm4MoeForCausalLM", configs.glm4_moe_config, configs.read_glm4_moe),
        heads="sequential",
        qkv_bias=None,
    ),
    # transformers knows Qwen2 but would read "mimo" with the code of XiaomiMiMo's repository alone;
    # vLLM goes by the architecture.
    "mimo_hf": replace(
        _dense("MiMoForCausalLM", "qwen2", qkv_bias=True),
        names=names.mimo_hf,
        heads="sequential",
        trunk_state="raw",
    ),
    "mellum_hf": Format(
        *(names.mellum_hf, "MellumForCausalLM", configs.mellum_config, configs.read_mellum),
        heads="sequential",
        most_modules=1,
        qk_norm=True,
    ),
    "medusa": Format(
        *(names.medusa, "MedusaModel", configs.medusa_config, configs.read_medusa),
        kind=None,
        heads="medusa",
        qkv_bias=None,
    ),
    "meta": Format(
        *(names.meta, "", configs.meta_params, configs.read_meta, "pth"),
        heads="parallel",
        qk_norm=False,
    ),
    "deepseek_v3_hf": Format(
        *(deepseek_v3.names, "DeepseekV3ForCausalLM"),
        *(deepseek_v3.write_config, deepseek_v3.read_config),
        kind="deepseek_v3",
        heads="sequential",
    ),
    "torchtitan": Format(names.torchtitan, "", lambda _: {}, container="dcp", kind=None),
}
"""Every format, by the word after `--format`."""


def find_format(name: str) -> Format:
    """A format by its name. Error: there is none; the nearest is named."""
    if name in FORMATS:
        return FORMATS[name]
    nearest = difflib.get_close_matches(name, FORMATS, n=1, cutoff=0.4)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise UserError(f"--format {name}: expected one of {', '.join(FORMATS)}{hint}")


def open_tensors(form: Format, folder: Path) -> Tensors:
    """The tensors of a folder. Errors: missing or damaged files."""
    if form.container == "safetensors":
        return without_quantization(hf_tensors(folder))
    return meta_tensors(folder) if form.container == "pth" else dcp_tensors(find_checkpoint(folder))


def vocabulary_of(tensors: Tensors) -> int:
    """Rows of the embedding of a model of ours. Error: there is none."""
    if (embedding := tensors.kinds.get("tok_embeddings.weight")) is None:
        raise UserError(f"{tensors.where}: no tok_embeddings.weight in it; expected a model")
    return embedding.shape[0]


def check_tensors(source: Tensors, table: Names, args: ModelArgs) -> None:
    """The tensors are those of the table, in name and, by ours, in shape; those of `Names.repeats`
    may be there as well, and say what it says.

    Raises:
        UserError: naming the first that is not so, or whose dtype no weight has here.
    """
    expected = {name: Size(shape) for name, shape in table.zeros.items()}
    for entry in table.entries:
        expected |= dict.fromkeys(entry.theirs, entry.their_shape)
    repeats = {**table.repeats, **table.copies}
    if lost := [name for name in expected if name not in source.kinds]:
        raise UserError(f"{source.where}: lacks {names_line(lost)} of the model")
    if extra := [name for name in source.kinds if name not in expected and name not in repeats]:
        raise UserError(f"{source.where}: holds {names_line(extra)}, which have no place")
    for name, shape in expected.items():
        if (found := source.kinds[name].shape) != shape:
            raise UserError(
                f"{source.where}: {name} has shape {tuple(found)}, expected {tuple(shape)}"
            )
        if (dtype := source.kinds[name].dtype) not in DTYPES:
            known = ", ".join(map(str, DTYPES))
            raise UserError(f"{source.where}: {name} is of {dtype}, expected one of {known}")
    for name, of in repeats.items():
        if wrong := differing(source, name, of, args):
            why = "modules share the trunk's here: save the folder without them"
            if of == FREQUENCIES:
                why = f"by rope_theta = {args.rope_theta:g}"
            elif name in (HEAD, "output.weight"):
                why = "the model ties them: set tied_embeddings = false"
            raise UserError(f"{wrong}; {why}")


def differing(source: Tensors, name: str, of: str, args: ModelArgs) -> str:
    """By how much a tensor, where it is there, differs from another or from FREQUENCIES; ""."""
    if name not in source.kinds or of not in {FREQUENCIES, *source.kinds}:
        return ""
    found, rotary = source.read(name), of == FREQUENCIES
    far = rope_mismatch(found, args) if rotary else difference(found, source.read(of))
    return "" if far == 0 else f"{source.where}: {name} differs from {of} by up to {far:.3g}"


def dtype_of(name: str, kept: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """What one of our tensors is converted to: experts' biases are small steps added up, and stay
    as they are."""
    return kept if wanted is None or name.endswith(".expert_bias") else wanted


def verify(written: Tensors, tensors: Tensors) -> None:
    """What was written reads back to the bit. Error: naming the tensor that does not."""
    for name in tensors.kinds:
        if not torch.equal(written.read(name), tensors.read(name)):
            raise UserError(f"{written.where}: {name} reads back differently")
    logger.info("verified %d tensors by reading them back", len(tensors.kinds))
