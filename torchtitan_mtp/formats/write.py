"""Write tensors one at a time, as safetensors files, a .pth file or a DCP folder.

A folder is written aside and renamed when it is whole, so that a death at any moment leaves no
OUT; memory holds one tensor at a time.
"""

from __future__ import annotations

import json
import logging
import math
import mmap
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Size, Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex

from torchtitan_mtp.checkpoint.load import first_failure
from torchtitan_mtp.checkpoint.manifest import MODEL_ONLY, Manifest, write_manifest
from torchtitan_mtp.checkpoint.state import quiet
from torchtitan_mtp.checkpoint.storage import SummingWriter
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats.read import INDEX, WEIGHTS
from torchtitan_mtp.writing import sync

logger = logging.getLogger(__name__)

DTYPES = {  # that weights may have, and their names in safetensors
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
}


class Output(NamedTuple):
    """A tensor to write, and how to get it."""

    name: str
    shape: Size
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


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
    new_parents = [folder for folder in out.parents if not os.path.lexists(folder)]
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
        with suppress(OSError):  # `out` is in them
            for folder in new_parents:
                folder.rmdir()


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Indented, as Hugging Face writes it."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_safetensors(folder: Path, outputs: Sequence[Output], max_shard_size: int) -> None:
    """model.safetensors, or shards of at most `max_shard_size` bytes and an index of all tensors.

    A tensor above that size gets a shard of its own.
    """
    shards: list[list[Output]] = [[]]
    for output in outputs:
        if shards[-1] and sum(o.bytes for o in shards[-1]) + output.bytes > max_shard_size:
            shards.append([])
        shards[-1].append(output)
    if len(shards) == 1:
        _write_shard(folder / WEIGHTS, shards[0])
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shard)
        weight_map |= {output.name: name for output in shard}
    total = sum(output.bytes for output in outputs)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)


def _write_shard(file: Path, shard: Sequence[Output]) -> None:
    """The safetensors format: length of the header, the header as JSON, the tensors' bytes."""
    shard = sorted(shard, key=lambda output: -output.dtype.itemsize)  # so that all are aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for output in shard:
        start, end = end, end + output.bytes
        header[output.name] = {
            "dtype": DTYPES[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for output in shard:
            flat = output.read().contiguous().flatten()
            stream.write(flat.view(torch.uint8).numpy().data)


def write_pth(file: Path, outputs: Sequence[Output]) -> None:
    """A dict of tensors as torch.save writes it, filled through a memory map."""
    empty = {output.name: torch.empty(output.shape, dtype=output.dtype) for output in outputs}
    with torch.serialization.skip_data():  # reserves their bytes; untouched memory costs nothing
        torch.save(empty, file)
    del empty
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        state = torch.load(file, mmap=True, weights_only=True)
    for output in outputs:
        state[output.name].copy_(output.read())


class _Planner(DefaultSavePlanner):
    """Plans with shapes alone, and reads each tensor when its turn to be written has come."""

    def __init__(self, outputs: Sequence[Output]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._outputs = {output.name: output for output in outputs}

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._outputs[index.fqn].read()


def write_dcp(
    folder: Path, outputs: Sequence[Output], record: dict[str, Any], tokenizer: str | None = None
) -> None:
    """A model-only checkpoint of one rank; its manifest has the record and the fingerprint."""
    shapes = {o.name: torch.empty(o.shape, dtype=o.dtype, device="meta") for o in outputs}
    # The writer keeps what it put into a file until the file is done: one a tensor, then, and
    # nothing copied ahead.
    writer = SummingWriter(
        folder, single_file_per_rank=False, sync_files=False, per_thread_copy_ahead=0
    )
    quiet()
    try:
        dcp.save(shapes, storage_writer=writer, planner=_Planner(outputs), no_dist=True)
    except CheckpointException as error:
        raise first_failure(error) from None
    write_manifest(folder, Manifest(0, MODEL_ONLY, 1, writer.entries, record, tokenizer))
