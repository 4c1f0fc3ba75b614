"""Import another program's checkpoint: a run's folder to generate with and to start from."""

from __future__ import annotations

import logging
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from torchtitan_mtp.build import spec_from_config, write_spec_to_config
from torchtitan_mtp.checkpoint.record import record_of, untold
from torchtitan_mtp.checkpoint.state import cast_weights
from torchtitan_mtp.config import MTP, JobConfig, load_toml, to_toml
from torchtitan_mtp.config.values import HERE
from torchtitan_mtp.data.tokenizer import build_tokenizer
from torchtitan_mtp.errors import UserError, memory_told
from torchtitan_mtp.formats.configs import Reader, Unsupported, read_modules
from torchtitan_mtp.formats.formats import (
    FORMATS,
    Format,
    check_tensors,
    differing,
    dtype_of,
    find_format,
    open_tensors,
    verify,
    vocabulary_of,
)
from torchtitan_mtp.formats.names import EMBEDDING, HEAD, swap_halves, to_pairs
from torchtitan_mtp.formats.read import Kind, Tensors, dcp_tensors, read_json
from torchtitan_mtp.formats.tokenizer_files import check_rows, copy_tokenizer
from torchtitan_mtp.formats.write import write_dcp, written_aside
from torchtitan_mtp.models.args import ModelSpec
from torchtitan_mtp.models.flavors import check_shape

logger = logging.getLogger(__name__)


@memory_told("one tensor is held at a time; give it a machine with more memory")
def import_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format_name: str | None = None,
    *,
    config_file: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
) -> ModelSpec:
    """Make `out` a run's folder, with step-0, config.toml and tokenizer; what was read.

    Args:
        source: what `find_folder` understands.
        format_name: None: by the folder's files.
        config_file: TOML of the run, where the format does not say which model it is.
        dtype: of the weights; None: as they are stored.

    Raises:
        UserError: `out` exists; missing, damaged or unknown files; a tensor that has no place.
    """
    folder, out = find_folder(source), Path(os.path.abspath(out))
    format_name = format_name or ("torchtitan" if config_file else format_of(folder))
    form = find_format(format_name)
    if form.read_config is not None:
        config = JobConfig()
        spec, tensors = open_model(format_name, folder)
        write_spec_to_config(config, spec)
    elif config_file is None:
        raise UserError(
            f"--format {format_name}: its folders do not say which model they hold; give the run's "
            "TOML file with --config"
        )
    else:
        config, tensors = load_toml(Path(config_file)), open_tensors(form, folder)
        config.model.converters = [c for c in config.model.converters if c != "mtp"]
        config.mtp = MTP()
        spec = spec_from_config(config, vocabulary_of(tensors))
        logger.warning("%s: taken for a model with %s", tensors.where, untold(record_of(spec)))
    tensors = inward(tensors, form, spec, dtype)
    config.job.dump_folder, fingerprint = HERE, None
    with written_aside(out, tensors.bytes) as tmp:
        if form.read_config is not None:
            (tmp / "tokenizer").mkdir()
            config.model.hf_assets_path = f"{HERE}/tokenizer"
            if copy_tokenizer(str(folder), tmp / "tokenizer", ("config.json",)):
                tokenizer = build_tokenizer(str(folder))
                check_rows(tokenizer, folder, spec.args.vocab_size)
                fingerprint = tokenizer.fingerprint
            else:
                shutil.rmtree(tmp / "tokenizer")
                config.model.hf_assets_path = ""
                logger.warning(
                    "%s: no tokenizer; set model.hf_assets_path in %s to one",
                    *(folder, out / "config.toml"),
                )
        (tmp / "config.toml").write_text(to_toml(config), encoding="utf-8")
        step = tmp / config.checkpoint.folder / "step-0"
        write_dcp(step, tensors, record_of(spec), fingerprint)
        verify(dcp_tensors(step), tensors)
    return spec


def find_folder(source: str | os.PathLike[str]) -> Path:
    """A folder; that of the newest snapshot in one of the hub's cache; or that of a model
    "org/name" there. Error: there is none."""
    folder, name, hint = Path(source), str(source), ""
    if not folder.is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        # By HF_HUB_CACHE, HF_HOME and so on; tokenizers needs this package as well.
        from huggingface_hub.constants import HF_HUB_CACHE

        folder = Path(HF_HUB_CACHE, "models--" + name.replace("/", "--"))
        hint = f", nor a model in {HF_HUB_CACHE}; for one of the hub: hf download {name}"
    if (main := folder / "refs" / "main").is_file():
        folder = folder / "snapshots" / main.read_text().strip()
    if not folder.is_dir():
        raise UserError(f"{name if hint else folder}: no such folder{hint}")
    return folder


def format_of(folder: Path) -> str:
    """The name of the format that a folder is in, by the architecture that its config.json names.
    Error: none."""
    file = folder / "config.json"
    if not file.is_file() and (folder / "params.json").is_file():
        return "meta"
    found = Reader(file, read_json(file)).architectures()
    known = {a: name for name, form in FORMATS.items() for a in (form.architecture, form.also) if a}
    for architecture in found:
        if architecture in known:
            return known[architecture]
    raise Unsupported(
        f"{file}: architectures = {found} is not supported here, only {', '.join(known)}"
    )


def open_model(name: str, folder: Path) -> tuple[ModelSpec, Tensors]:
    """The model that a folder says it holds, and its tensors. Errors: as `import_checkpoint`."""
    form = FORMATS[name]
    assert form.read_config is not None
    file = folder / ("params.json" if form.container == "pth" else "config.json")
    reader = Reader(file, read_json(file))
    if form.architecture and (right := format_of(folder)) != name:
        found = f"architectures = {reader.architectures()}, but {name} is {form.architecture}"
        raise UserError(f"{file}: {found}; use --format {right}")
    quantized = reader.mapping("quantization_config", "compression_config", "quantization")
    if not quantized and (folder / "hf_quant_config.json").is_file():
        quantized = {"quant_method": "hf_quant_config.json"}
    Reader(file, quantized).expect("activation_scheme", "dynamic", None)
    if quantized and (method := quantized.get("quant_method", "another program's")) != "fp8":
        raise UserError(
            f"{file}: quantized weights ({method}) are not read here; load the folder with "
            "transformers, call model.dequantize(), save it and import that"
        )
    args = form.read_config(reader)
    spec = ModelSpec(args)
    if form.heads and (further := read_modules(reader)):
        spec = ModelSpec(args, form.heads, 1 + further, trunk_state=form.trunk_state)
    try:
        check_shape(args)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    tensors = open_tensors(form, folder)
    if args.tied_embeddings and EMBEDDING not in tensors.kinds and HEAD in tensors.kinds:
        kinds = {EMBEDDING if name == HEAD else name: kind for name, kind in tensors.kinds.items()}
        read = tensors.read  # tied either way
        tensors = Tensors(folder, kinds, lambda name: read(HEAD if name == EMBEDDING else name))
    modules = [e.theirs[0] for e in form.names(spec).entries if e.ours.startswith("mtp.")]
    if spec.heads == "sequential" and tensors.kinds.keys().isdisjoint(modules):
        # transformers saves but the count.
        logger.warning("%s: names %d modules and holds none of them", folder, spec.num_modules)
        spec = ModelSpec(spec.args)
    if args.tied_embeddings and (wrong := differing(tensors, HEAD, EMBEDDING, args)):
        logger.warning("%s: read as not tied, as transformers does", wrong)
        spec = replace(spec, args=replace(args, tied_embeddings=False))
    return spec, tensors


def inward(
    tensors: Tensors, form: Format, spec: ModelSpec, dtype: torch.dtype | None = None
) -> Tensors:
    """What to read, in our names; every tensor of theirs has been given its place.

    Raises:
        UserError: a tensor is missing, has no place or another shape, or should be zero.
    """
    table = form.names(spec)
    check_tensors(tensors, table, spec.args)
    for name in table.zeros:
        if tensors.read(name).any():
            what = "is not zero: a mixture of experts, which is not supported here"
            raise UserError(f"{tensors.where}: {name} {what}")
    entries = {entry.ours: entry for entry in table.entries}
    kinds = {
        ours: Kind(entry.shape, dtype_of(ours, tensors.kinds[entry.theirs[0]].dtype, dtype))
        for ours, entry in entries.items()
    }

    def read_one(name: str, to: torch.dtype) -> Tensor:
        return cast_weights(tensors.read(name), to, f"{tensors.where}: {name}")

    def read(ours: str) -> Tensor:
        entry, (shape, to) = entries[ours], kinds[ours]
        if not entry.stacked:
            tensor = read_one(entry.theirs[0], to)
            tensor = to_pairs(tensor, spec.args.head_dim) if entry.rotary else tensor
            return swap_halves(tensor) if entry.swapped else tensor
        whole = torch.empty(shape, dtype=to)
        for part, name in zip(whole, entry.theirs, strict=True):
            part.copy_(read_one(name, to))
        return whole

    return Tensors(tensors.where, kinds, read)
