"""Tensors of a checkpoint one at a time, from a DCP folder, safetensors files or pickled ones."""

from __future__ import annotations

import json
import logging
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Size, Tensor

from torchtitan_mtp.checkpoint.load import (
    one_line,
    open_checkpoint,
    read_whole,
    stored_model_names,
)
from torchtitan_mtp.checkpoint.metadata import bare_name
from torchtitan_mtp.distributed.ranks import Ranks
from torchtitan_mtp.errors import UserError, hub_hint, reading

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
_PICKLED = "pytorch_model.bin"


class Kind(NamedTuple):
    """Shape and dtype of a stored tensor."""

    shape: Size
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Tensors:
    """Tensors by name, of a checkpoint or to be written as one; `where` names the place that they
    come from, `read` gives one, on a CPU; `files` where each lies, of a folder of such files."""

    where: Path
    kinds: dict[str, Kind]
    read: Callable[[str], Tensor]
    files: Mapping[str, Path] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(kind.bytes for kind in self.kinds.values())


def dcp_tensors(path: Path) -> Tensors:
    """The model of a DCP folder, written by any number of ranks; its files are verified first."""
    opened = open_checkpoint(path, Ranks(alone=True))
    keys, stored = stored_model_names(opened), opened.stored
    kinds = {n: Kind(stored[k].size, stored[k].properties.dtype) for n, k in keys.items()}
    return Tensors(path, kinds, lambda name: read_whole(opened, keys[name]))


def hf_tensors(path: Path) -> Tensors:
    """A folder of model.safetensors or pytorch_model.bin, or of the files that an index of either
    lists."""
    for name in (WEIGHTS, _PICKLED):
        index = _read_index(path / f"{name}.index.json")
        alone = (path / name).is_file()
        if index and alone and name not in index.values():
            raise UserError(f"{path}: holds {name} and an index of others; remove what is old")
        if index or alone:
            files = sorted(set(index.values())) or [name]
            return _file_tensors(path, [path / file for file in files], index)
    raise UserError(f"{path / WEIGHTS}: missing, and no {_PICKLED} or index; download it again")


def meta_tensors(path: Path) -> Tensors:
    """Meta's consolidated.pth."""
    files = sorted(path.glob("consolidated*.pth"))
    if len(files) != 1:
        raise UserError(
            f"{path}: {len(files)} files consolidated*.pth, expected one; parts of tensor "
            "parallelism are not merged here"
        )
    return _file_tensors(files[0], files, {})


def _file_tensors(where: Path, files: Sequence[Path], index: Mapping[str, str]) -> Tensors:
    """index: the file that is to be read for a name, should several hold it."""
    if lost := [file for file in files if not file.is_file()]:
        raise UserError(f"{lost[0]}: missing; download it again")
    for file in files:
        with reading(str(file)), file.open("rb") as stream:
            head = stream.read(100)
        if not head or head.startswith(b"version https://git-lfs"):
            what = "a pointer of git-lfs, not the file: git lfs pull" if head else "empty: copy it"
            raise UserError(f"{file}: {what}, or download it again")
    held = {file: _kinds(file) for file in files}
    file_of = {name: file for file, kinds in held.items() for name in kinds}
    for name, file_name in index.items():
        file_of[name] = where / file_name
        if name not in held[where / file_name]:
            what = f"its index says that {name} is in {file_name}, which does not hold it"
            raise UserError(f"{where}: {what}; download the folder again")
    for file, kinds in held.items():
        for name in kinds:
            chosen = file_of[name]
            if chosen != file and (far := difference(_read(file, name), _read(chosen, name))):
                what = f"differs by up to {far:.3g} from that of {chosen.name}"
                logger.warning("%s: its %s is not read, and %s", file, name, what)
    kinds = {name: held[file][name] for name, file in file_of.items()}
    return Tensors(where, kinds, lambda name: _read(file_of[name], name), file_of)


def _read(file: Path, name: str) -> Tensor:
    # Opened for each tensor: what was read through a mapping counts as memory until it is shut.
    if file.suffix != ".safetensors":
        return _load_pickled(file)[name]
    with _open_safetensors(file) as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor


def _kinds(file: Path) -> dict[str, Kind]:
    if file.suffix != ".safetensors":
        return {name: Kind(t.shape, t.dtype) for name, t in _load_pickled(file).items()}
    kinds = {}
    with _open_safetensors(file) as opened:
        for key in opened.keys():  # noqa: SIM118 (it is no dict)
            part = opened.get_slice(key)
            shape = Size(part.get_shape())
            # Its dtype has a name of its own; an empty part of the tensor has torch's.
            try:
                dtype = part[:0].dtype if shape else part[...].dtype
            except (SafetensorError, RuntimeError) as error:
                raise UserError(
                    f"{file}: {key} is of {part.get_dtype()}, which torch can't read"
                ) from error
            kinds[key] = Kind(shape, dtype)
    return kinds


def _read_index(file: Path) -> dict[str, str]:
    """Tensor -> file of a sharded folder; empty where there is one file."""
    if not file.is_file():
        return {}
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{file}: no weight_map in it; expected an index of files of tensors")
    for name in weight_map.values():
        if not bare_name(name):
            raise UserError(f"{file}: names the file {name!r}, expected one of this folder")
    return weight_map


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file}: not a whole safetensors file ({error}); download it again"
        ) from error


def _load_pickled(file: Path) -> dict[str, Tensor]:
    """What torch.save wrote; nothing in it is run, and it is mapped, not read as a whole, but for
    torch's form of before 1.6, which is no zip file."""
    try:
        mmap = zipfile.is_zipfile(file)
        state = torch.load(file, map_location="cpu", mmap=mmap, weights_only=True)
    except Exception as error:  # a crafted file makes torch raise nearly anything
        raise UserError(f"{file}: can't be read as plain tensors: {one_line(error)}") from error
    if not isinstance(state, dict):
        raise UserError(f"{file}: expected a dict of tensors, found {type(state).__name__}")
    for name, value in state.items():
        if not (isinstance(name, str) and _plain(value)):
            raise UserError(f"{file}: {name!r}: expected a dict of plain tensors by name")
    return {name: tensor.detach().resolve_neg() for name, tensor in state.items()}


def _plain(value: Any) -> bool:
    """Whether it is a tensor with a number in memory for each of its places."""
    return (
        isinstance(value, Tensor)
        and (value.layout, value.device.type) == (torch.strided, "cpu")
        and not (value.is_quantized or value.is_nested or value.is_complex())
    )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Errors: no such file, or something else in it."""
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        hint = hub_hint(file.parent)
        raise UserError(f"{file}: missing; it says which model this is{hint}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def difference(a: Tensor, b: Tensor) -> float:
    """The largest |a - b|, 0.0 where they are equal; at little memory."""
    if a.shape != b.shape:
        return math.inf
    pairs = zip(a.flatten().split(2**20), b.flatten().split(2**20), strict=True)
    far = [(x.double() - y.double()).abs().amax() for x, y in pairs if x.numel()]
    return torch.stack(far).amax().item() if far else 0.0
