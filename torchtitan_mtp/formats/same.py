"""A model of transformers goes back into the folder that it came from: `--format same`.

What training left as it was stays as it is, file for file: a file of which no tensor differs is the
source's own, and what belongs to the model but is no weight is copied. Files with tensors that
differ are written anew under the same names; modules that the folder did not have, in one more.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchtitan_mtp.build import model_of_spec
from torchtitan_mtp.checkpoint.load import names_line
from torchtitan_mtp.checkpoint.manifest import read_manifest
from torchtitan_mtp.checkpoint.record import constants, record_of
from torchtitan_mtp.checkpoint.state import cast_weights
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats.formats import FORMATS, verify
from torchtitan_mtp.formats.hf_trunk import TrunkFolder
from torchtitan_mtp.formats.native_modules import (
    Contract,
    applied_otherwise,
    architecture_of,
    contract_of,
    misfit,
)
from torchtitan_mtp.formats.read import INDEX, WEIGHTS, Tensors, hf_tensors, read_json
from torchtitan_mtp.formats.write import write_json, write_shard, written_aside
from torchtitan_mtp.models.args import ModelSpec

logger = logging.getLogger(__name__)

SAME = "same"
MODULES = "model-mtp.safetensors"
# Files that are not the trained model's: its weights of before, in any format.
_WEIGHTS = ("safetensors", "bin", "bin.index.json", "pt", "pth", "gguf", "h5", "msgpack", "onnx")
_LEFT_OUT = shutil.ignore_patterns(".cache", ".git", *(f"*.{kind}" for kind in _WEIGHTS))


def refusal_of_same(spec: ModelSpec, path: str = "") -> str:
    """Why a model can't go back into its folder, that at `path`, and what can be done; "" where it
    can."""
    if spec.hf_config is None:
        return 'goes back into a folder that a run with model.name = "hf" began from; take another'
    if path and not any(Path(path).glob("*.safetensors")):
        return f"{path} has no safetensors files; save it as such first"
    if not spec.heads or not (why := misfit(spec)):
        return ""
    kind = architecture_of(spec)
    names = [n for n, form in FORMATS.items() if kind and kind in (form.architecture, form.also)]
    native = f"import it as {names[0]} and train that, or " if names else ""
    return f"{why}; {native}leave the heads out with --drop_heads"


def write_same(
    source: Tensors, path: Path, spec: ModelSpec, out: Path, drop_heads: bool
) -> ModelSpec:
    """Write a checkpoint's model into the new folder `out`, a copy of `path` but for its weights;
    what was written.

    source: the checkpoint. spec: its model. drop_heads: leave out its heads, and modules that
    `path` has.

    Raises:
        UserError: another model than `path` is of, or heads that have no place in it.
    """
    spec = ModelSpec(spec.args, hf_config=spec.hf_config) if drop_heads else spec
    if why := refusal_of_same(spec):
        raise UserError(f"--format {SAME}: {why}")
    contract = contract_of(spec) if spec.heads or drop_heads else None
    if told := applied_otherwise(spec, architecture_of(spec)):
        logger.warning("%s: %s", out, told)
    model: Any = model_of_spec(spec)
    _check_model(source, path, model)
    folder = TrunkFolder(path, model, contract)
    before, now = folder.tensors, _trained(source, folder)
    if dropped := {name for name in folder.rest if folder.place(name)}:
        logger.warning("%s: left out %s", out, names_line(sorted(dropped)))
    files: dict[str, list[str]] = {}
    for name in now.kinds:
        file = before.files.get(name, Path(MODULES))
        if file.suffix != ".safetensors":
            raise UserError(f"{file}: expected safetensors files; save the folder as such first")
        files.setdefault(file.name, []).extend([] if name in dropped else [name])
    new = [name for name in now.kinds if name not in before.kinds]
    with written_aside(out, sum(now.kinds[name].bytes for name in new)) as tmp:
        changed: list[str] = []
        _copy_others(path, tmp)
        for file_name, names in files.items():
            held = [name for name, file in before.files.items() if file.name == file_name]
            if held == names and all(_bits_equal(before.read(n), now.read(n)) for n in names):
                _link(path / file_name, tmp / file_name)
            elif names:
                write_shard(tmp / file_name, now, names)
                changed += names
        _write_index(tmp, files, now)
        if contract is not None:
            _write_config(tmp / "config.json", contract, model, bool(new))
        kinds = {name: now.kinds[name] for name in changed}
        verify(hf_tensors(tmp), Tensors(source.where, kinds, now.read))
    logger.info("%s: %d tensors are in files that differ from those of %s", out, len(changed), path)
    return spec


def _check_model(source: Tensors, path: Path, model: Any) -> None:
    """The checkpoint is of this model of the folder."""
    ours, manifest = constants(record_of(model.spec)), read_manifest(source.where)
    record = constants(manifest.record) if manifest and manifest.record else {}
    for key, value in record.items():
        if key.startswith("config.json ") and value != ours.get(key, value):
            trained = f"{source.where} was trained with {value}; name its folder (--from)"
            raise UserError(f"{path}: {key} = {ours[key]}, {trained}")
    tied = {f"{model.output_name}.weight"} if model.args.tied_embeddings else set()
    for name, tensor in model.state_dict().items():
        kind = source.kinds.get(name)
        if name not in tied and (kind is None or kind.shape != tensor.shape):
            found = f"{name} of shape {tuple(tensor.shape)}, {source.where} has "
            found += "none" if kind is None else str(tuple(kind.shape))
            raise UserError(f"{path}: its model has {found}")


def _trained(source: Tensors, folder: TrunkFolder) -> Tensors:
    """What is to be in the folder: its tensors, and those of modules that it has not."""
    before, embedding = folder.tensors, folder.parameter("tok_embeddings")
    makers, kinds = folder.written(), dict(before.kinds)
    parts = {folder.on_disk(ours): ours for ours in makers}
    shapes = functools.lru_cache(maxsize=1)(lambda back: back(folder.shape))
    for name, ours in parts.items():
        kinds[name] = folder.kind(ours, shapes(makers[ours])[ours])

    def parameter(name: str) -> Tensor:
        return source.read(name if name in source.kinds else embedding)

    # A mixture's two stacks are written in turns.
    made = functools.lru_cache(maxsize=2)(lambda back: back(parameter))

    def read(name: str) -> Tensor:
        if name in parts:
            tensor = made(makers[parts[name]])[parts[name]]
        elif name in folder.copies:
            tensor = parameter(folder.copies[name])
        else:
            return before.read(name)
        if tensor.shape != before.kinds.get(name, kinds[name]).shape:
            raise UserError(f"{before.where}: transformers would write {name} in another shape")
        return cast_weights(tensor, kinds[name].dtype, f"{source.where}: {name}")

    return Tensors(before.where, kinds, read)


def _copy_others(path: Path, tmp: Path) -> None:
    """What in a folder is no weight, but not as read-only as it may be. A folder that `tmp` is in
    (a run in its model's own) is left out, and one that a link leads to once more."""
    seen = {path.resolve()}
    for place, folders, names in os.walk(path, followlinks=True):
        left_out, to = _LEFT_OUT(place, folders + names), tmp / Path(place).relative_to(path)
        to.mkdir(exist_ok=True)
        for name in {*names} - left_out:
            if (file := Path(place, name)).exists():
                shutil.copyfile(file, to / name)
            else:
                logger.warning("%s: a link to nothing, left out", file)
        real = {name: Path(place, name).resolve() for name in {*folders} - left_out}
        inside = tmp.resolve()
        folders[:] = [n for n, at in real.items() if not (at in seen or inside.is_relative_to(at))]
        seen |= {real[name] for name in folders}


def _bits_equal(a: Tensor, b: Tensor) -> bool:
    flat = (x.contiguous().flatten().view(torch.uint8) for x in (a, b))
    return torch.equal(*flat)


def _link(file: Path, to: Path) -> None:
    """The same file, at no room; a copy on another disk."""
    try:
        os.link(file.resolve(), to)
    except OSError:
        shutil.copyfile(file, to)


def _write_index(out: Path, files: dict[str, list[str]], tensors: Tensors) -> None:
    """An index where there are several files or was one, unless that one says so."""
    if WEIGHTS in files and len(files) > 1:  # who finds that name looks for no index
        first = "model-00001-of-00001.safetensors"
        (out / WEIGHTS).rename(out / first)
        files[first] = files.pop(WEIGHTS)
    index = read_json(out / INDEX) if (out / INDEX).exists() else {}
    places = {name: file for file, names in files.items() for name in names}
    if index.get("weight_map", {}) == (places if index or len(files) > 1 else {}):
        return
    size = sum(tensors.kinds[name].bytes for name in places)
    metadata = (index.get("metadata") or {}) | {"total_size": size}
    write_json(out / INDEX, {"metadata": metadata, "weight_map": places})


def _write_config(file: Path, contract: Contract, model: Any, added: bool) -> None:
    """The number of modules in config.json, where it says one that is not so; of new ones their
    kinds, too."""
    told, modules = read_json(file), model.spec.num_modules
    holder = told.get("text_config", told)
    kinds = {key: getattr(model.causal.config, key) for key in contract.kinds if added}
    new = {f"mtp_{key}": [kind[model.head_layer]] * modules for key, kind in kinds.items()}
    if holder.get(contract.count, None if added else modules) != modules:
        holder |= {contract.count: modules} | new
        write_json(file, told)
