"""The formats that there are, and what all of them share."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
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
    Kind,
    Tensors,
    dcp_tensors,
    difference,
    hf_tensors,
    meta_tensors,
)
from torchtitan_mtp.formats.write import DTYPES, Output
from torchtitan_mtp.models.args import ModelArgs, ModelSpec
from torchtitan_mtp.models.rope import rope_tables

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Format:
    """One format.

    architecture: what its config.json names; also: another that is read as this one. Without
    read_config its folders do not say which model they hold. container: "safetensors", "pth" or
    "dcp". kind: of the blocks that it holds (`ModelSpec.kind`), None for any. heads: the family
    that it holds, if any, most_modules how many of them, and trunk_state what the first of
    sequential ones reads. qk_norm, qkv_bias: what it needs, None for either.
    """

    names: Callable[[ModelSpec], Names]
    architecture: str = ""
    write_config: Callable[[ModelSpec], dict[str, Any]] | None = None
    read_config: Callable[[Reader], ModelArgs] | None = None
    container: str = "safetensors"
    kind: str | None = "llama"
    heads: str = ""
    most_modules: int | None = None
    trunk_state: Literal["normalized", "raw"] = "normalized"
    qk_norm: bool | None = None
    qkv_bias: bool | None = False
    also: str = ""


# (`hf_format` takes the first that holds a model.)
FORMATS: dict[str, Format] = {
    "llama_hf": Format(
        names.llama_hf,
        "LlamaForCausalLM",
        partial(configs.dense_config, "LlamaForCausalLM", "llama"),
        configs.read_dense,
        qk_norm=False,
        also="MistralForCausalLM",
    ),
    "qwen2_hf": Format(
        names.llama_hf,
        "Qwen2ForCausalLM",
        partial(configs.dense_config, "Qwen2ForCausalLM", "qwen2"),
        partial(configs.read_dense, qkv_bias=True),
        qk_norm=False,
        qkv_bias=True,
    ),
    "qwen3_hf": Format(
        names.llama_hf,
        "Qwen3ForCausalLM",
        partial(configs.dense_config, "Qwen3ForCausalLM", "qwen3"),
        partial(configs.read_dense, qk_norm=True, head_dim=128),
        qk_norm=True,
    ),
    "glm4_moe_hf": Format(
        *(names.glm4_moe_hf, "Glm4MoeForCausalLM", configs.glm4_moe_config, configs.read_glm4_moe),
        heads="sequential",
        qkv_bias=None,
    ),
    "mimo_hf": Format(
        *(names.mimo_hf, "MiMoForCausalLM", configs.mimo_config),
        partial(configs.read_dense, qkv_bias=True),
        heads="sequential",
        trunk_state="raw",
        qk_norm=False,
        qkv_bias=True,
    ),
    "mellum_hf": Format(
        *(names.mellum_hf, "MellumForCausalLM", configs.mellum_config, configs.read_mellum),
        heads="sequential",
        most_modules=1,
        qk_norm=True,
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
    "torchtitan": Format(names.torchtitan, container="dcp", kind=None),
}


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


def check_tensors(
    source: Tensors, expected: Mapping[str, Size], optional: Collection[str] = ()
) -> None:
    """The tensors are those expected, in name and shape; `optional` ones may be there as well.

    Raises:
        UserError: naming the first that is not, or whose dtype no weight has here.
    """
    if lost := [name for name in expected if name not in source.kinds]:
        raise UserError(f"{source.where}: lacks {names_line(lost)} of the model")
    if extra := [name for name in source.kinds if name not in expected and name not in optional]:
        raise UserError(f"{source.where}: holds {names_line(extra)}, which have no place")
    for name, shape in expected.items():
        if (found := source.kinds[name].shape) != shape:
            raise UserError(
                f"{source.where}: {name} has shape {tuple(found)}, expected {tuple(shape)}"
            )
        if (dtype := source.kinds[name].dtype) not in DTYPES:
            known = ", ".join(map(str, DTYPES))
            raise UserError(f"{source.where}: {name} is of {dtype}, expected one of {known}")


def check_repeats(source: Tensors, repeats: Mapping[str, str], args: ModelArgs) -> None:
    """Tensors that are left out say what `Names.repeats` says. Error: one that does not."""
    for name, of in repeats.items():
        if not (wrong := differing(source, name, of, args)):
            continue
        if of == FREQUENCIES:
            raise UserError(f"{wrong}: rope_theta = {args.rope_theta:g} is not that of the weights")
        if name in (HEAD, "output.weight"):
            raise UserError(f"{wrong}; the model ties them: set tied_embeddings = false")
        raise UserError(f"{wrong}; modules share the trunk's here: save the folder without them")


def differing(source: Tensors, name: str, of: str, args: ModelArgs) -> str:
    """By how much a tensor, where it is there, differs from another or from FREQUENCIES; ""."""
    if name not in source.kinds or of not in {FREQUENCIES, *source.kinds}:
        return ""
    found, loose = source.read(name), 0.0
    if of == FREQUENCIES:
        cos, sin = rope_tables(replace(args, max_seq_len=2), "cpu")
        frequencies = torch.atan2(sin[1], cos[1])  # the angles of position 1
        fits = found.shape == frequencies.shape
        found, expected = found / frequencies if fits else found, torch.ones_like(frequencies)
        loose = 0.05  # some are stored in half precision
    else:
        expected = source.read(of)
    far = difference(found, expected)
    same = far <= loose  # not so where it is not a number
    return "" if same else f"{source.where}: {name} differs from {of} by up to {far:.3g}"


def dtype_of(name: str, kind: Kind, wanted: torch.dtype | None) -> torch.dtype:
    """What one of our tensors is converted to: experts' biases are small steps added up, and stay
    as they are."""
    return kind.dtype if wanted is None or name.endswith(".expert_bias") else wanted


def verify(written: Tensors, outputs: Sequence[Output]) -> None:
    """What was written reads back to the bit. Error: naming the tensor that does not."""
    for output in outputs:
        if not torch.equal(written.read(output.name), output.read()):
            raise UserError(f"{written.where}: {output.name} reads back differently")
    logger.info("verified %d tensors by reading them back", len(outputs))
