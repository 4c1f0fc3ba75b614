"""Sources of the same documents in every form, loaders of them, and what a loader should give."""

import functools
import gzip
import io
import itertools
import json

import numpy as np
import torch
from fake_hub import FakeIterableDataset

from torchtitan_mtp.data.hub import StreamSource
from torchtitan_mtp.data.loader import DataLoader
from torchtitan_mtp.data.mixture import Mixture
from torchtitan_mtp.data.order import shuffled
from torchtitan_mtp.data.sources import build_source
from torchtitan_mtp.data.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
S, N = 16, 3
EPOCHS = 30  # of a lane, more than any test here reads
TEXTS = [f"<{i}>" + "abcdefgh"[i % 8] * (i * 7 % 41) for i in range(90)]


def put(path, content):
    """Write a file, unless it is as it should be: a source of it may be open."""
    if not path.exists() or path.read_bytes() != content:
        path.write_bytes(content)


def jsonl(folder, texts=TEXTS, **kwargs):
    path = folder / "a.jsonl"
    put(path, "".join(json.dumps({"text": t}) + "\n" for t in texts).encode())
    return build_source("files", str(path), **kwargs)


def text_folder(folder):
    for i, text in enumerate(TEXTS):
        put(folder / f"{i:03}.txt", text.encode())
    return build_source("files", str(folder))


def compressed_jsonl(folder):
    jsonl(folder)
    packed = folder / "b.jsonl.gz"
    put(packed, gzip.compress((folder / "a.jsonl").read_bytes(), mtime=0))
    return build_source("files", str(packed))


def parquet(folder, texts=TEXTS, **kwargs):
    import pyarrow
    import pyarrow.parquet

    path, content = folder / "a.parquet", io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), content, row_group_size=8)
    put(path, content.getvalue())
    return build_source("files", str(path), **kwargs)


def hub(folder, shards=16):
    records = [{"text": t} for t in TEXTS]
    return StreamSource(
        "org/name", dataset=FakeIterableDataset([records[i::shards] for i in range(shards)])
    )


def hub_of_one_file(folder):
    return hub(folder, shards=1)


def stdlib(folder):
    return build_source("python_stdlib")


def mixture(folder):
    sources = []
    for name, kind in {"first": jsonl, "second": text_folder, "third": hub}.items():
        (folder / name).mkdir(exist_ok=True)
        sources.append(kind(folder / name))
    return Mixture(sources, [0.5, 0.3, 0.2])


KINDS = [jsonl, text_folder, compressed_jsonl, parquet, hub, hub_of_one_file, stdlib, mixture]


def loader(source, rank=0, world=1, batch=1, prefetch=0, **kwargs):
    kwargs = {"seed": 5, "split": "all", **kwargs}
    return DataLoader(source, TOKENIZER, S, N, batch, rank, world, prefetch=prefetch, **kwargs)


def rows(window):
    """A window's rows as comparable data."""
    mask = window.loss_mask
    mask = torch.ones_like(window.tokens, dtype=torch.bool) if mask is None else mask
    parts = (window.tokens.tolist(), window.doc_ids.tolist(), mask.tolist())
    return list(zip(*parts, strict=True))


def draw(loaders, windows, batch=1):
    """The next rows of all ranks in global order."""
    out = []
    for _ in range(windows // (len(loaders) * batch)):
        by_rank = [rows(x.next_window()) for x in loaders]
        out += itertools.chain.from_iterable(zip(*by_rank, strict=True))
    return out


def naive_stream(source, seed, epoch):
    """All tokens of an epoch, each with its document's number."""
    stream = []
    for number in shuffled(np.arange(len(source)), seed, epoch).tolist():
        text = [TOKENIZER.bos_id, *source[number].text.encode(), TOKENIZER.eos_id]
        stream += [(token, number) for token in text if source.sizes()[number] >= 0]
    return stream


@functools.cache
def naive_epochs(source, seed, epochs):
    return [naive_stream(source, seed, epoch) for epoch in range(epochs)]


def naive_lane(source, lane, num_lanes, seed, epochs):
    """A lane's tokens and numbers of its pieces of documents, whole."""
    tokens, pieces, piece = [], [], 0
    for epoch, stream in enumerate(naive_epochs(source, seed, epochs)):
        segment = (lane + epoch) % num_lanes
        start, stop = (len(stream) * i // num_lanes for i in (segment, segment + 1))
        inside = 0 < stop < len(stream) and stream[stop][1] == stream[stop - 1][1]
        for _, same in itertools.groupby(stream[start : stop + inside], lambda item: item[1]):
            part = [token for token, _ in same]
            tokens += part
            pieces += [piece] * len(part)
            piece += 1
    return tokens, pieces
