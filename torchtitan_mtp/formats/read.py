"""Tensors of a checkpoint one at a time, from a DCP folder, safetensors files or a .pth file."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Size, Tensor

from torchtitan_mtp.checkpoint.load import (
    Opened,
    one_line,
    open_checkpoint,
    read_states,
    stored_model_names,
)
from torchtitan_mtp.checkpoint.metadata import bare_name
from torchtitan_mtp.checkpoint.ranks import Ranks
from torchtitan_mtp.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Kind(NamedTuple):
    """Shape and dtype of a stored tensor."""

    shape: Size
    dtype: torch.dtype


class Tensors(Protocol):
    """A checkpoint's tensors by name; `where` names the place in messages."""

    where: Path
    kinds: dict[str, Kind]

    def read(self, name: str) -> Tensor:
        """One tensor, whole, on the CPU."""
        ...


class DCPTensors:
    """The model of a DCP folder, written by any number of ranks; its files are verified first."""

    def __init__(self, path: Path) -> None:
        self.where = path
        self._ranks = Ranks(alone=True)
        self._opened: Opened = open_checkpoint(path, self._ranks)
        self._keys = stored_model_names(self._opened)
        stored = self._opened.stored
        self.kinds = {
            name: Kind(stored[key].size, stored[key].properties.dtype)
            for name, key in self._keys.items()
        }

    def read(self, name: str) -> Tensor:
        tensor = torch.empty(self.kinds[name].shape, dtype=self.kinds[name].dtype)
        read_states(self._opened, {self._keys[name]: tensor}, self._ranks)
        return tensor


class SafetensorsTensors:
    """A folder of model.safetensors, or of the files that model.safetensors.index.json lists."""

    def __init__(self, path: Path) -> None:
        self.where = path
        index = _read_index(path)
        self.kinds = {}
        self._file_of: dict[str, Path] = {}
        for name in sorted(set(index.values())) if index else [WEIGHTS]:
            with _open_safetensors(path / name) as file:
                for key in file.keys():  # noqa: SIM118 (it is no dict)
                    part = file.get_slice(key)
                    shape = Size(part.get_shape())
                    # Its dtype has a name of its own; an empty part of the tensor has torch's.
                    try:
                        dtype = part[:0].dtype if shape else part[...].dtype
                    except (SafetensorError, RuntimeError) as error:
                        raise UserError(
                            f"{path / name}: {key} is of {part.get_dtype()}, which torch can't read"
                        ) from error
                    self.kinds[key] = Kind(shape, dtype)
                    self._file_of[key] = path / name
        for key, name in index.items():
            if self._file_of.get(key) != path / name:
                raise UserError(
                    f"{path / INDEX}: says that {key} is in {name}, which does not hold it; "
                    "download the folder again"
                )

    def read(self, name: str) -> Tensor:
        # Opened for each tensor: what was read through a mapping counts as memory until it is shut.
        with _open_safetensors(self._file_of[name]) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def _read_index(path: Path) -> dict[str, str]:
    """Tensor -> file of a sharded folder; empty where there is one file."""
    file = path / INDEX
    if not file.is_file():
        return {}
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{file}: no weight_map in it; expected an index of safetensors files")
    for name in weight_map.values():
        if not bare_name(name):
            raise UserError(f"{file}: names the file {name!r}, expected one of this folder")
    return weight_map


def _open_safetensors(file: Path) -> Any:
    if not file.is_file():
        raise UserError(f"{file}: missing; download it again")
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file}: not a whole safetensors file ({error}); download it again"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Errors: no such file, or something else in it."""
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{file}: missing; it says which model this is") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def _plain(value: Any) -> bool:
    """Whether it is a tensor with a number in memory for each of its places."""
    return (
        isinstance(value, Tensor)
        and (value.layout, value.device.type) == (torch.strided, "cpu")
        and not (value.is_quantized or value.is_nested or value.is_complex())
    )


class PthTensors:
    """Meta's consolidated.pth; nothing in it is run, and it is mapped, not read as a whole."""

    def __init__(self, path: Path) -> None:
        files = sorted(path.glob("consolidated*.pth"))
        if len(files) != 1:
            raise UserError(
                f"{path}: {len(files)} files consolidated*.pth, expected one"
                + ("; parts of tensor parallelism are not merged here" if files else "")
            )
        self.where = files[0]
        try:
            state = torch.load(self.where, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # a crafted file makes torch raise nearly anything
            reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
            reason = reason if isinstance(error, pickle.UnpicklingError) else one_line(error)
            raise UserError(f"{self.where}: can't be read as plain tensors: {reason}") from error
        if not isinstance(state, dict):
            found = type(state).__name__
            raise UserError(f"{self.where}: expected a dict of tensors, found {found}")
        for name, value in state.items():
            if not (isinstance(name, str) and _plain(value)):
                raise UserError(f"{self.where}: {name!r}: expected a dict of plain tensors by name")
        self._state = {name: tensor.detach().resolve_neg() for name, tensor in state.items()}
        self.kinds = {name: Kind(t.shape, t.dtype) for name, t in self._state.items()}

    def read(self, name: str) -> Tensor:
        return self._state[name]
