"""Write tensors one at a time, as safetensors files, a .pth file or a DCP folder.

A folder is written aside and renamed when it is whole, so that a death at any moment leaves no
OUT; memory holds one tensor at a time.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex

from torchtitan_mtp.checkpoint.load import first_failure
from torchtitan_mtp.checkpoint.manifest import MODEL_ONLY, Manifest, write_manifest
from torchtitan_mtp.checkpoint.state import quiet
from torchtitan_mtp.checkpoint.storage import SummingWriter
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats.read import INDEX, Tensors
from torchtitan_mtp.writing import sync

logger = logging.getLogger(__name__)

DTYPES = {  # that weights may have, and their names in safetensors
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
}
_STORED = DTYPES | {  # and what else may lie beside them
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@contextmanager
def written_aside(out: Path, total_bytes: int) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end, or vanishes on an error.

    Raises:
        UserError: `out` is there already, no room for `total_bytes`, or no way to write.
    """
    out = Path(os.path.abspath(out))
    if os.path.lexists(out):
        raise UserError(f"{out}: is there already; name a folder that is not")
    tmp = out.with_name(f"{out.name}.torchtitan_mtp.tmp")  # a name that nobody else gives
    try:
        if tmp.exists():
            logger.warning("%s: left by an interrupted run, removed", tmp)
            shutil.rmtree(tmp)
        tmp.mkdir(parents=True)
        free = shutil.disk_usage(tmp).free
        if free < total_bytes:
            raise UserError(f"{out}: needs {total_bytes:,} bytes, {free:,} are free; make room")
        yield tmp
        for file in tmp.rglob("*"):
            sync(file)
        sync(tmp)
        tmp.rename(out)
        sync(out.parent)
    except OSError as error:
        raise UserError(f"{out}: can't be written: {error}") from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Indented, as Hugging Face writes it."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_safetensors(folder: Path, tensors: Tensors, max_shard_size: int) -> None:
    """model.safetensors, or shards of at most `max_shard_size` bytes and an index of all tensors.

    A tensor above that size gets a shard of its own.
    """
    from huggingface_hub import split_torch_state_dict_into_shards  # tokenizers needs it as well

    split = split_torch_state_dict_into_shards(_shapes(tensors), max_shard_size=max_shard_size)
    for name, shard in split.filename_to_tensors.items():
        write_shard(folder / name, tensors, shard)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / INDEX, index)


def _shapes(tensors: Tensors) -> dict[str, Tensor]:
    """The tensors without numbers."""
    kinds = tensors.kinds.items()
    return {n: torch.empty(kind.shape, dtype=kind.dtype, device="meta") for n, kind in kinds}


def write_shard(file: Path, tensors: Tensors, names: Sequence[str]) -> None:
    """Some tensors in the safetensors format: length of the header, the header as JSON, the
    tensors' bytes."""
    kinds = tensors.kinds
    names = sorted(names, key=lambda name: -kinds[name].dtype.itemsize)  # so that all are aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        if kinds[name].dtype not in _STORED:
            raise UserError(f"{file}: {name} is of {kinds[name].dtype}, which is not written here")
        start, end = end, end + kinds[name].bytes
        header[name] = {
            "dtype": _STORED[kinds[name].dtype],
            "shape": list(kinds[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            flat = tensors.read(name).contiguous().flatten()
            stream.write(flat.view(torch.uint8).numpy().data)


def write_pth(file: Path, tensors: Tensors) -> None:
    """A dict of tensors as torch.save writes it, filled through a memory map."""
    kinds = tensors.kinds.items()
    empty = {name: torch.empty(kind.shape, dtype=kind.dtype) for name, kind in kinds}
    with torch.serialization.skip_data():  # reserves their bytes; untouched memory costs nothing
        torch.save(empty, file)
    del empty
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        state = torch.load(file, mmap=True, weights_only=True)
    for name in tensors.kinds:
        state[name].copy_(tensors.read(name))


class _Planner(DefaultSavePlanner):
    """Plans with shapes alone, and reads each tensor when its turn to be written has come."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tensors = tensors

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._tensors.read(index.fqn)


def write_dcp(
    folder: Path, tensors: Tensors, record: dict[str, Any], tokenizer: str | None = None
) -> None:
    """A model-only checkpoint of one rank; its manifest has the record and the fingerprint."""
    # The writer keeps what it put into a file until the file is done: one a tensor, then, and
    # nothing copied ahead.
    writer = SummingWriter(
        folder, single_file_per_rank=False, sync_files=False, per_thread_copy_ahead=0
    )
    quiet()
    try:
        dcp.save(_shapes(tensors), storage_writer=writer, planner=_Planner(tensors), no_dist=True)
    except CheckpointException as error:
        raise first_failure(error) from None
    write_manifest(folder, Manifest(0, MODEL_ONLY, 1, writer.entries, record, tokenizer))
