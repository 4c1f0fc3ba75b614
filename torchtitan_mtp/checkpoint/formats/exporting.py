"""Export the model of a checkpoint to another program's format."""

from __future__ import annotations

import logging
import os
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor

from torchtitan_mtp.checkpoint.folders import find_checkpoint, find_config
from torchtitan_mtp.checkpoint.formats.formats import (
    FORMATS,
    Format,
    check_tensors,
    dtype_of,
    find_format,
    open_tensors,
    verify,
)
from torchtitan_mtp.checkpoint.formats.names import Entry, Names, swap_halves, to_halves
from torchtitan_mtp.checkpoint.formats.read import DCPTensors, Tensors
from torchtitan_mtp.checkpoint.formats.spec import ModelSpec, spec_of_run
from torchtitan_mtp.checkpoint.formats.tokenizer_files import copy_tokenizer
from torchtitan_mtp.checkpoint.formats.write import (
    Output,
    write_dcp,
    write_json,
    write_pth,
    write_safetensors,
    written_aside,
)
from torchtitan_mtp.checkpoint.load import names_line
from torchtitan_mtp.checkpoint.record import keeps_earlier, record_of, untold
from torchtitan_mtp.config import JobConfig, load_toml
from torchtitan_mtp.data.tokenizer import build_tokenizer
from torchtitan_mtp.errors import UserError

logger = logging.getLogger(__name__)

DEFAULT_SHARD_SIZE = 5 * 10**9  # bytes


def export_checkpoint(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format_name: str,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    drop_heads: bool = False,
) -> ModelSpec:
    """Write the model of a checkpoint into the new folder `out`; what was written.

    Args:
        checkpoint: what `find_checkpoint` understands, saved by any number of ranks.
        dtype: of the weights; None: as they are stored.
        max_shard_size: bytes of a safetensors file.
        drop_heads: leave out heads that the format can't hold.

    Raises:
        UserError: `out` exists; a model that the format can't hold; a tensor that has no place.
    """
    form = find_format(format_name)
    config = load_toml(find_config(checkpoint))
    source = DCPTensors(find_checkpoint(checkpoint))
    embedding = source.kinds.get("tok_embeddings.weight")
    if embedding is None:
        raise UserError(f"{source.where}: no tok_embeddings.weight in it; expected a model")
    spec = spec_of_run(config, embedding.shape[0], keeps_earlier(config, source.where))
    check_tensors(source, spec.shapes(), _tied(spec))
    spec = _fitting(form, format_name, spec, source, drop_heads)
    settings = {} if form.write_config is None else form.write_config(spec)
    outputs = _outward(source, form.names(spec), spec, dtype)
    with written_aside(Path(out), sum(output.bytes for output in outputs)) as folder:
        if form.container == "safetensors":
            write_safetensors(folder, outputs, max_shard_size)
            _write_hf_files(folder, config, settings, outputs[0].dtype)
        elif form.container == "pth":
            write_pth(folder / "consolidated.pth", outputs)
            write_json(folder / "params.json", settings)
            copy_tokenizer(config.model.hf_assets_path, folder)
        else:
            record = record_of(spec) | {"format": format_name}
            write_dcp(folder, outputs, record=record)
            logger.warning("%s: TorchTitan's flavor has to have %s", out, untold(record))
        verify(open_tensors(form, folder), outputs, source)
    return spec


def _tied(spec: ModelSpec) -> set[str]:
    return {"output.weight"} if spec.args.tied_embeddings else set()


def _fitting(
    form: Format, name: str, spec: ModelSpec, source: Tensors, drop_heads: bool
) -> ModelSpec:
    """`spec`, or its trunk where its heads are to be dropped. Error: the format can't hold it."""
    if form.kind not in (None, spec.kind):
        raise UserError(f"--format {name}: is for models of another kind; {_advice(spec)}")
    for key, what in (
        ("qk_norm", "norms of queries and keys"),
        ("qkv_bias", "biases of queries, keys and values"),
    ):
        if getattr(form, key) not in (None, has := getattr(spec.args, key)):
            other = "no " if has else ""
            raise UserError(
                f"--format {name}: takes models with {other}{what} (model.args.{key}), this one is "
                f"another; {_advice(spec)}"
            )
    if _has_place_for_heads(form, spec):
        return spec
    heads = [key for key in source.kinds if key.startswith("mtp.")]
    if not drop_heads:
        fit = [key for key, f in FORMATS.items() if holds(f, spec)]
        use = f"use {' or '.join(fit)}, or " if fit else ""
        if spec.heads == form.heads and spec.trunk_state != form.trunk_state:
            raise UserError(
                f"--format {name}: its modules read the trunk's {form.trunk_state} state, this "
                f"model's the {spec.trunk_state} one (mtp.trunk_state); {use}leave them out with "
                "--drop_heads"
            )
        raise UserError(
            f"--format {name}: can't hold the {spec.modules} {spec.heads} heads beside the trunk "
            f"({names_line(heads)}); {use}leave them out with --drop_heads"
        )
    for k in range(spec.modules):
        part = [key for key in heads if key.startswith(f"mtp.heads.{k}.")]
        logger.warning("dropped mtp.heads.%d: %s", k, names_line(part))
    return spec.without_heads()


def _has_place_for_heads(form: Format, spec: ModelSpec) -> bool:
    few = form.most_modules is None or spec.modules <= form.most_modules
    return not spec.heads or (
        spec.heads == form.heads and few and spec.trunk_state == form.trunk_state
    )


def holds(form: Format, spec: ModelSpec) -> bool:
    """Whether an export in the format, with the heads, would not be refused."""
    if not fits(form, spec):
        return False
    try:
        if form.write_config is not None:
            form.write_config(spec)
    except UserError:
        return False
    return True


def fits(form: Format, spec: ModelSpec) -> bool:
    """Whether the format has a place for each tensor of the model, whatever its config can say."""
    args = spec.args
    if form.kind not in (None, spec.kind):
        return False
    if form.qk_norm not in (None, args.qk_norm) or form.qkv_bias not in (None, args.qkv_bias):
        return False
    return _has_place_for_heads(form, spec)


def _advice(spec: ModelSpec) -> str:
    """The formats that hold the model, or its trunk where none does."""
    if fit := [key for key, form in FORMATS.items() if holds(form, spec)]:
        return f"try {', '.join(fit)}"
    if fit := [key for key, form in FORMATS.items() if holds(form, spec.without_heads())]:
        return f"try {', '.join(fit)} with --drop_heads"
    return "no format here holds it"


def _outward(
    source: Tensors, table: Names, spec: ModelSpec, dtype: torch.dtype | None
) -> list[Output]:
    """What to write, in their names."""
    head_dim = spec.args.head_dim
    stacked = lru_cache(maxsize=1)(source.read)  # its parts are written one after another

    def read(entry: Entry, to: torch.dtype) -> Tensor:
        if entry.part is not None:
            return stacked(entry.ours)[entry.part].to(to)
        tensor = source.read(entry.ours)
        tensor = to_halves(tensor, head_dim) if entry.rotary else tensor
        return (swap_halves(tensor) if entry.swapped else tensor).to(to)

    outputs = []
    for entry in table.entries:
        kind = source.kinds[entry.ours]
        to = dtype_of(entry.ours, kind, dtype)
        theirs = kind.shape if entry.part is None else Size(kind.shape[1:])
        outputs.append(Output(entry.theirs, theirs, to, partial(read, entry, to)))
    for name, shape in table.zeros.items():
        # Routers and their biases are read in float32, whatever the model's dtype is.
        to = torch.float32 if name.endswith("_bias") else outputs[0].dtype
        outputs.append(Output(name, Size(shape), to, partial(torch.zeros, shape, dtype=to)))
    return outputs


def _write_hf_files(
    folder: Path, config: JobConfig, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    path, special = config.model.hf_assets_path, {}
    if path:
        tokenizer = build_tokenizer(path)
        copy_tokenizer(path, folder)
        ends = list(tokenizer.eos_ids)
        special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends if ends[1:] else ends[0]}
        special |= {"pad_token_id": tokenizer.pad_id} if tokenizer.pad_id is not None else {}
    else:
        logger.warning("%s: without a tokenizer, as the run is", folder.name)
    dtype_name = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", settings | special | {"dtype": dtype_name})
    write_json(folder / "generation_config.json", special)
