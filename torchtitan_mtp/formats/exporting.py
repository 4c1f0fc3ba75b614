"""Export the model of a checkpoint to another program's format."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor

from torchtitan_mtp.build import parameter_shapes, spec_from_config
from torchtitan_mtp.checkpoint.folders import find_checkpoint, find_config
from torchtitan_mtp.checkpoint.load import names_line
from torchtitan_mtp.checkpoint.record import check_tokenizer, keeps_earlier, record_of, untold
from torchtitan_mtp.checkpoint.state import cast_weights
from torchtitan_mtp.config import JobConfig, load_toml
from torchtitan_mtp.data.tokenizer import TiktokenTokenizer, build_tokenizer
from torchtitan_mtp.errors import UserError, memory_told
from torchtitan_mtp.formats import names
from torchtitan_mtp.formats.formats import (
    FORMATS,
    Format,
    check_tensors,
    dtype_of,
    find_format,
    open_tensors,
    verify,
    vocabulary_of,
)
from torchtitan_mtp.formats.names import Names, swap_halves, to_halves
from torchtitan_mtp.formats.native_modules import applied_otherwise
from torchtitan_mtp.formats.read import Kind, Tensors, dcp_tensors, read_json
from torchtitan_mtp.formats.same import SAME, write_same
from torchtitan_mtp.formats.tokenizer_files import GENERATION, copy_tokenizer, write_tokenizer_json
from torchtitan_mtp.formats.write import (
    write_dcp,
    write_json,
    write_pth,
    write_safetensors,
    written_aside,
)
from torchtitan_mtp.models.args import ModelSpec

logger = logging.getLogger(__name__)

DEFAULT_SHARD_SIZE = 5 * 10**9
"""Bytes of a file of weights, at most, if nothing else is said."""

UNCAPPED = "no config in such a folder holds loss.softcap = {}: others would sample without the cap"


@memory_told("one tensor is held at a time; give it a machine with more memory")
def export_checkpoint(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format_name: str,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    drop_heads: bool = False,
    modules: int | None = None,
    origin: str = "",
) -> ModelSpec:
    """Write the model of a checkpoint into the new folder `out`; what was written.

    Args:
        checkpoint: what `find_checkpoint` understands, saved by any number of ranks.
        dtype: of the weights; None: as they are stored.
        max_shard_size: bytes of a safetensors file.
        drop_heads: leave out heads that the format can't hold.
        modules: of the further heads, write the first so many; None: all.
        origin: the folder that a model of transformers came from, where it is not at the run's
            model.hf_assets_path any more.

    Raises:
        UserError: `out` exists; a model that the format can't hold; a tensor that has no place.
    """
    form = None if format_name == SAME else find_format(format_name)
    if origin and form is not None:
        raise UserError(f"--from {origin}: goes with --format {SAME}; leave it out")
    config = load_toml(find_config(checkpoint))
    config.model.hf_assets_path = origin or config.model.hf_assets_path
    cap, source = config.loss.softcap, dcp_tensors(find_checkpoint(checkpoint))
    rows = 0 if config.model.name == "hf" else vocabulary_of(source)
    spec = spec_from_config(config, rows, keeps_earlier(config, source.where))
    _check_asked(form, format_name, spec, cap, dtype)
    if form is None:
        check_tokenizer(source.where, config.model.hf_assets_path)
        origin, spec = config.model.hf_assets_path, _first(spec, modules)
        return write_same(source, Path(origin), spec, Path(out), drop_heads)
    check_tensors(source, names.torchtitan(spec), spec.args)
    kept = _fitting(form, format_name, _first(spec, modules), drop_heads)
    for k in range(kept.num_modules, spec.num_modules):
        part = [key for key in source.kinds if key.startswith(f"mtp.heads.{k}.")]
        logger.warning("dropped mtp.heads.%d: %s", k, names_line(part))
    spec = kept
    if told := applied_otherwise(spec, form.architecture):
        logger.warning("%s: %s", out, told)
    if form.container != "dcp":  # nothing of the tokenizer goes there
        check_tokenizer(source.where, config.model.hf_assets_path)
    table = form.names(spec)
    placed = {entry.ours for entry in table.entries}
    if left := [key for key in parameter_shapes(spec) if key not in placed]:
        how = "another --format with --drop_heads writes the model that they draft for"
        logger.warning("%s: holds heads without %s; %s", out, names_line(left), how)
    tensors = _outward(source, table, spec, dtype)
    with written_aside(Path(out), tensors.bytes) as folder:
        if form.container == "dcp":
            record = record_of(spec) | {"softcap": cap, "format": format_name}
            write_dcp(folder, tensors, record)
            logger.warning("%s: TorchTitan's flavor has to have %s", out, untold(record))
        else:
            _write_model(form, folder, tensors, config, spec, max_shard_size)
        verify(open_tensors(form, folder), tensors)
    return spec


def _check_asked(
    form: Format | None,
    name: str,
    spec: ModelSpec,
    cap: float | None,
    dtype: torch.dtype | None,
) -> None:
    """Errors: what a format, `SAME` if None, does not do with such a model."""
    told = f"--format {name}"
    if form is None:
        if dtype is not None:
            raise UserError(f"--dtype: {told} keeps that of each tensor; leave it out")
    elif spec.hf_config is not None:
        raise UserError(f'{told}: holds no model of model.name = "hf"; --format {SAME} does')
    elif cap is not None and form.container != "dcp":
        ways = "decode here, or train on without it (checkpoint.initial_load_path) and export that"
        raise UserError(f"{told}: {UNCAPPED.format(cap)}; {ways}")


def _write_model(
    form: Format,
    folder: Path,
    tensors: Tensors,
    config: JobConfig,
    spec: ModelSpec,
    max_shard_size: int,
) -> None:
    """Weights, the configuration that describes them, and the tokenizer."""
    if form.container == "safetensors":
        write_safetensors(folder, tensors, max_shard_size)
        dtype = next(iter(tensors.kinds.values())).dtype
        _write_hf_files(folder, config, form.write_config(spec), dtype)
        return
    write_pth(folder / "consolidated.pth", tensors)
    write_json(folder / "params.json", form.write_config(spec))
    if config.model.hf_assets_path:
        copy_tokenizer(config.model.hf_assets_path, folder)


def _first(spec: ModelSpec, modules: int | None) -> ModelSpec:
    """`spec` with the first so many further heads, or all. Error: it has not as many."""
    if modules is None:
        return spec
    if not 1 <= modules <= spec.num_modules:
        raise UserError(
            f"--modules {modules}: the model has {spec.num_modules}; give 1 to as many, or "
            "--drop_heads"
        )
    return replace(spec, num_future_tokens=modules + 1, share_weights=False)


def _fitting(form: Format, name: str, spec: ModelSpec, drop_heads: bool) -> ModelSpec:
    """`spec`, or its trunk where its heads are to be dropped. Error: the format can't hold it."""
    if not (why := refusal(form, spec)):
        return spec
    trunk = ModelSpec(spec.args)
    bare, fit = formats_for(trunk), formats_for(spec)
    if drop_heads and name in bare:
        return trunk
    ways = [f"try {', '.join(fit)}"] if fit else []
    if spec.num_modules > 1 and not refusal(form, _first(spec, 1)):
        ways.append("write the first with --modules 1")
    if spec.heads and name in bare:
        ways.append("leave them out with --drop_heads")
    elif spec.heads and bare:
        ways.append(f"try {', '.join(bare)} with --drop_heads")
    raise UserError(f"--format {name}: {why}; {', or '.join(ways) or 'no format here holds it'}")


def formats_for(spec: ModelSpec) -> list[str]:
    """The formats that hold a model, in the order of `FORMATS`."""
    return [name for name, form in FORMATS.items() if not refusal(form, spec)]


def refusal(form: Format, spec: ModelSpec) -> str:
    """What of the model has no place in the format or its config; "" where all has."""
    if spec.hf_config is not None:
        return (
            f"is of this project's models, this one is transformers' {spec.hf_config['model_type']}"
        )
    if form.kind not in (None, spec.block_type):
        return "is for models of another kind"
    for key, what in (
        ("qk_norm", "norms of queries and keys"),
        ("qkv_bias", "biases of queries, keys and values"),
    ):
        if getattr(form, key) not in (None, has := getattr(spec.args, key)):
            other = "no " if has else ""
            return f"takes models with {other}{what} (model.args.{key}), this one is another"
    if spec.heads == form.heads and spec.trunk_state != form.trunk_state:
        return (
            f"its modules read the trunk's {form.trunk_state} state, this model's the "
            f"{spec.trunk_state} one (mtp.trunk_state)"
        )
    if spec.heads and (spec.heads != form.heads or spec.num_modules > form.most_modules):
        return f"can't hold the {spec.num_modules} {spec.heads} heads beside the trunk"
    try:
        form.write_config(spec)
    except UserError as error:
        return str(error)
    return ""


def _outward(source: Tensors, table: Names, spec: ModelSpec, dtype: torch.dtype | None) -> Tensors:
    """What to write, in their names."""
    ours = {entry.ours: entry for entry in table.entries}
    copies = [replace(ours[of], theirs=(name,)) for name, of in table.copies.items()]
    places, kinds = {}, {}
    for entry in (*table.entries, *copies):
        to = dtype_of(entry.ours, source.kinds[entry.ours].dtype, dtype)
        for part, name in enumerate(entry.theirs):
            places[name], kinds[name] = (entry, part), Kind(entry.their_shape, to)
    most = next(iter(kinds.values())).dtype
    for name, shape in table.zeros.items():
        # Routers and their biases are read in float32, whatever the model's dtype is.
        kinds[name] = Kind(Size(shape), torch.float32 if name.endswith("_bias") else most)
    stacked = lru_cache(maxsize=1)(source.read)  # its parts are written one after another

    def read(name: str) -> Tensor:
        if name in table.zeros:
            return torch.zeros(kinds[name].shape, dtype=kinds[name].dtype)
        entry, part = places[name]
        tensor = stacked(entry.ours)[part] if entry.stacked else source.read(entry.ours)
        tensor = to_halves(tensor, spec.args.head_dim) if entry.rotary else tensor
        tensor = swap_halves(tensor) if entry.swapped else tensor
        return cast_weights(tensor, kinds[name].dtype, f"{source.where}: {entry.ours}")

    return Tensors(source.where, kinds, read)


def _write_hf_files(
    folder: Path, config: JobConfig, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    """config.json, generation_config.json and the tokenizer's files. What came with the tokenizer
    stays as it was; of generation_config.json, ids that it lacks are added."""
    generation: dict[str, Any] = {}
    if path := config.model.hf_assets_path:
        tokenizer = build_tokenizer(path)
        copy_tokenizer(path, folder)
        if isinstance(tokenizer, TiktokenTokenizer) and not (folder / "tokenizer.json").exists():
            write_tokenizer_json(tokenizer, folder)
            (folder / "original").mkdir(exist_ok=True)
            for file in folder.glob("*.model"):  # llama.cpp takes one here for SentencePiece's
                file.rename(folder / "original" / "tokenizer.model")
        given = read_json(folder / GENERATION) if (folder / GENERATION).exists() else {}
        generation = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
        generation |= {key: value for key, value in given.items() if value is not None}
        told = generation.get("eos_token_id", [])
        ends = [*dict.fromkeys([*(told if isinstance(told, list) else [told]), *tokenizer.eos_ids])]
        generation["eos_token_id"] = ends if ends[1:] else ends[0]
    else:
        logger.warning("%s: without a tokenizer, as the run is", folder.name)
    ids = {f"{kind}_token_id" for kind in ("bos", "eos", "pad")} & generation.keys()
    settings |= {key: generation[key] for key in sorted(ids)}
    write_json(folder / "config.json", settings | {"dtype": str(dtype).removeprefix("torch.")})
    write_json(folder / GENERATION, generation)
