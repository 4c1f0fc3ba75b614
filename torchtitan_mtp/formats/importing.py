"""Import another program's checkpoint: a run's folder to generate with and to start from."""

from __future__ import annotations

import logging
import os
import shutil
from functools import partial
from pathlib import Path

import torch
from torch import Size, Tensor

from torchtitan_mtp.checkpoint.record import record_of, untold
from torchtitan_mtp.config import MTP, JobConfig, load_toml, to_toml
from torchtitan_mtp.data.tokenizer import build_tokenizer
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats.configs import Reader
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
from torchtitan_mtp.formats.names import Entry, swap_halves, to_pairs
from torchtitan_mtp.formats.read import DCPTensors, Tensors, read_json
from torchtitan_mtp.formats.tokenizer_files import CONFIGS, check_rows, copy_tokenizer
from torchtitan_mtp.formats.write import Output, write_dcp, written_aside
from torchtitan_mtp.models.flavors import check_shape
from torchtitan_mtp.spec import ModelSpec, describe_run, spec_of_run

logger = logging.getLogger(__name__)


def import_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format_name: str,
    *,
    config_file: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
) -> ModelSpec:
    """Make `out` a run's folder, with step-0, config.toml and tokenizer; what was read.

    Args:
        source: a folder in the format.
        config_file: TOML of the run, where the format does not say which model it is.
        dtype: of the weights; None: as they are stored.

    Raises:
        UserError: `out` exists; missing, damaged or unknown files; a tensor that has no place.
    """
    form, folder, out = find_format(format_name), Path(source), Path(os.path.abspath(out))
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if form.read_config is not None:
        config, spec = JobConfig(), read_spec(form, format_name, folder)
        describe_run(config, spec)
        tensors = open_tensors(form, folder)
    elif config_file is None:
        raise UserError(
            f"--format {format_name}: its folders do not say which model they hold; give the run's "
            "TOML file with --config"
        )
    else:
        config, tensors = load_toml(Path(config_file)), open_tensors(form, folder)
        config.model.converters = [c for c in config.model.converters if c != "mtp"]
        config.mtp = MTP()
        spec = spec_of_run(config, vocabulary_of(tensors))
        logger.warning("%s: taken for a model with %s", tensors.where, untold(record_of(spec)))
    outputs = inward(tensors, form, spec, dtype)
    config.job.dump_folder = str(out)
    with written_aside(out, sum(output.bytes for output in outputs)) as tmp:
        if form.read_config is not None:
            (tmp / "tokenizer").mkdir()
            config.model.hf_assets_path = str(out / "tokenizer")
            if copy_tokenizer(str(folder), tmp / "tokenizer", CONFIGS):
                check_rows(build_tokenizer(str(folder)), folder, spec.args.vocab_size)
            else:
                shutil.rmtree(tmp / "tokenizer")
                config.model.hf_assets_path = ""
                logger.warning(
                    "%s: no tokenizer; set model.hf_assets_path in %s to one",
                    *(folder, out / "config.toml"),
                )
        (tmp / "config.toml").write_text(to_toml(config), encoding="utf-8")
        step = tmp / config.checkpoint.folder / "step-0"
        write_dcp(step, outputs, record_of(spec))
        verify(DCPTensors(step), outputs, tensors)
    return spec


def read_spec(form: Format, name: str, folder: Path) -> ModelSpec:
    """The model that a folder says it holds. Error: no such file, or a model of another kind."""
    assert form.read_config is not None
    file = folder / ("params.json" if form.container == "pth" else "config.json")
    reader = Reader(file, read_json(file))
    found = reader.architectures()
    if form.architecture and form.architecture not in found:
        right = [key for key, f in FORMATS.items() if f.architecture and f.architecture in found]
        hint = f"; use --format {right[0]}" if right else "; it is not supported here"
        raise UserError(f"{file}: architectures = {found}, but {name} is {form.architecture}{hint}")
    spec = form.read_config(reader)
    try:
        check_shape(spec.args)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return _with_modules_there(form, spec, folder)


def _with_modules_there(form: Format, spec: ModelSpec, folder: Path) -> ModelSpec:
    """Without modules where none of their tensors is there: transformers saves but the count."""
    if not spec.modules or form.container != "safetensors":
        return spec
    kinds = open_tensors(form, folder).kinds
    theirs = [e.theirs for e in form.names(spec).entries if e.ours.startswith("mtp.")]
    if any(name in kinds for name in theirs):
        return spec
    logger.warning("%s: names %d modules and holds none of them", folder, spec.modules)
    return spec.without_heads()


def inward(
    tensors: Tensors, form: Format, spec: ModelSpec, dtype: torch.dtype | None = None
) -> list[Output]:
    """What to read, in our names; every tensor of theirs has been given its place.

    Raises:
        UserError: a tensor is missing, has no place or another shape, or should be zero.
    """
    table, shapes = form.names(spec), spec.shapes()
    by_ours: dict[str, list[Entry]] = {}
    for entry in table.entries:
        known = by_ours.setdefault(entry.ours, [])
        if entry.part is not None or not known:
            known.append(entry)
    expected = {
        entry.theirs: shapes[name] if entry.part is None else Size(shapes[name][1:])
        for name, entries in by_ours.items()
        for entry in entries
    }
    expected |= {name: Size(shape) for name, shape in table.zeros.items()}
    repeated = {entry.theirs for entry in table.entries} - expected.keys()
    check_tensors(tensors, expected, repeated | table.ignored)
    for name in table.zeros:
        if tensors.read(name).any():
            raise UserError(
                f"{tensors.where}: {name} is not zero: a mixture of experts, which is not "
                "supported here"
            )
    head_dim = spec.args.head_dim

    def read(entries: list[Entry], shape: Size, to: torch.dtype) -> Tensor:
        if entries[0].part is None:
            tensor = tensors.read(entries[0].theirs)
            tensor = to_pairs(tensor, head_dim) if entries[0].rotary else tensor
            return (swap_halves(tensor) if entries[0].swapped else tensor).to(to)
        whole = torch.empty(shape, dtype=to)
        for entry in entries:
            whole[entry.part].copy_(tensors.read(entry.theirs))
        return whole

    outputs = []
    for name, entries in by_ours.items():
        to = dtype_of(name, tensors.kinds[entries[0].theirs], dtype)
        outputs.append(Output(name, shapes[name], to, partial(read, entries, shapes[name], to)))
    return outputs
