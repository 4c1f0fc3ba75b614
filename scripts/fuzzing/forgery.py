"""Checkpoint indexes that are whole as files, and say what can't be."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

NUMBERS = [0, 1, -1, 7, 2**20, 2**40, 2**62, 2**70, -(2**40), None, "1", 1.5]
NAMES = [
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "a\0b",
    "nothing",
    None,
    3,
    "__0_0.distcp",
    ".metadata",
]
SIZES = [
    torch.Size([]),
    torch.Size([3]),
    torch.Size([2**40, 2**40]),
    torch.Size([0, 5]),
    (4, 4),
    None,
]
OTHERS = [torch.float16, torch.int8, torch.complex64, None, BytesStorageMetadata(), {}, [], "x"]


def forge_metadata(file: Path, rng: random.Random) -> None:
    """Change one thing in a `.metadata`."""
    metadata: Any = pickle.loads(file.read_bytes())
    index: Any = rng.choice(list(metadata.storage_data))
    info: Any = metadata.storage_data[index]
    tensors = {k: v for k, v in metadata.state_dict_metadata.items() if hasattr(v, "size")}
    name = rng.choice(list(tensors))
    tensor: Any = tensors[name]
    chunk: Any = tensor.chunks[0]
    change = rng.randrange(10)
    if change == 0:
        info.relative_path = rng.choice(NAMES)
    elif change == 1:
        info.offset = rng.choice(NUMBERS)
    elif change == 2:
        info.length = rng.choice(NUMBERS)
    elif change == 3:
        tensor.size = rng.choice(SIZES)
    elif change == 4:
        chunk.offsets, chunk.sizes = rng.choice(SIZES), rng.choice(SIZES)
    elif change == 5:
        tensor.properties.dtype = rng.choice(OTHERS)
    elif change == 6:
        metadata.state_dict_metadata[rng.choice([name, 3, "model.x"])] = rng.choice(OTHERS)
    elif change == 7:
        del metadata.storage_data[index]
    elif change == 8:
        metadata.storage_data[rng.choice([MetadataIndex(name, torch.Size([9, 9])), "x"])] = info
    else:
        field = rng.choice(["state_dict_metadata", "storage_data", "planner_data", "storage_meta"])
        setattr(metadata, field, rng.choice(OTHERS))
    file.write_bytes(pickle.dumps(metadata))


def forge_manifest(file: Path, rng: random.Random) -> None:
    """Change one thing in a manifest.json, and its checksum with it."""
    body = json.loads(file.read_text())
    del body["sha256"]
    name = rng.choice(list(body["files"]))
    change = rng.randrange(6)
    if change == 0:
        body["files"][name]["bytes"] = rng.choice(NUMBERS)
    elif change == 1:
        crc = body["files"][name]["crc32"]
        body["files"][name]["crc32"] = rng.choice([crc[:5], crc * 2, "x" * 8, "", None, 5, ["a"]])
    elif change == 2:
        body["files"][str(rng.choice(NAMES))] = body["files"].pop(name)
    elif change == 3:
        body[rng.choice(["step", "world_size", "kind", "format", "piece"])] = rng.choice(NUMBERS)
    elif change == 4:
        body["files"] = rng.choice([{}, [], None, {name: None}, {name: {}}, {name: {"bytes": 1}}])
    else:
        del body[rng.choice(list(body))]
    body["sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(body))
