"""How often each token of a corpus is a target: once an epoch, however its documents are sized.

`pytest -s` prints the table of docs/data.md.
"""

import functools
import re

import numpy as np
import pytest

from torchtitan_mtp.data import corpus as corpus_module
from torchtitan_mtp.data.corpus import Corpus
from torchtitan_mtp.data.document import Document
from torchtitan_mtp.data.lanes import corpus_pieces
from torchtitan_mtp.data.loader import DataLoader
from torchtitan_mtp.data.sources import build_source
from torchtitan_mtp.data.targets import IGNORE, make_batch
from torchtitan_mtp.data.tokenizer import ByteTokenizer

N = 3


class CountedSource:
    """Documents whose text is their number; `NumberedTokens` knows how many tokens each has."""

    name = fingerprint = "counted"
    has_conversations, bad_records = False, "stop"

    def __init__(self, sizes):
        self._sizes = np.array(sizes, np.int64)
        self.reads = 0

    def __len__(self):
        return len(self._sizes)

    def __getitem__(self, index):
        self.reads += 1
        return Document(str(index) if self._sizes[index] else "")

    def sizes(self):
        return self._sizes.copy()

    def where(self, index):
        return str(index)


class NumberedTokens:
    """Every token of a corpus has an id of its own, but for begin and end."""

    fingerprint = "numbered"

    def __init__(self, lengths):
        self._ends = np.cumsum(lengths)
        self._starts = self._ends - lengths
        self.bos_id, self.eos_id = int(self._ends[-1]), int(self._ends[-1]) + 1
        self.prefix, self.vocab_size = (self.bos_id,), self.eos_id + 1

    def encode(self, text):
        if not text:
            return np.empty(0, np.int32)
        return np.arange(self._starts[int(text)], self._ends[int(text)], dtype=np.int32)


class NumberedBytes(NumberedTokens, ByteTokenizer):
    """One token a byte, so that sizes are tokens."""


def lognormal():
    return np.exp(np.random.default_rng(0).normal(4, 2, 200)).astype(int)


SKEWED = {
    "one document with 97%": [30] * 40 + [38_800],
    "one document alone": [20_000],
    "lognormal lengths": lognormal(),
    "many tiny, some huge": [3] * 900 + [9_000] * 3,
    "half of them empty": [0, 120] * 150,
    "fewer documents than ranks": [4_000, 90, 7_000],
}


def target_counts(source, tokenizer, seq_len, total, world=1):
    """How often each token was a target of head 1 after `total` tokens, and the number of lanes."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for rank in range(world):
        options = {"split": "all", "prefetch": 0}
        lanes = DataLoader(source, tokenizer, seq_len, N, 1, rank, world, **options).state_dict()[
            "num_lanes"
        ]
        made = DataLoader(source, tokenizer, seq_len, N, lanes // world, rank, world, **options)
        for _ in range(total // (lanes * seq_len)):
            labels = make_batch(made.next_window(), N).labels[..., 0]
            np.add.at(counts, labels[labels != IGNORE].numpy(), 1)
    return counts, lanes


@functools.cache
def standard_library():
    """Bytes and words of each document: text whose bytes a token vary as they do."""
    source = build_source("python_stdlib")
    texts = [source[i].text for i in range(len(source))]
    return source.sizes(), np.array([len(re.findall(r"\w+|\s+|.", text)) for text in texts])


@pytest.mark.parametrize("tokens", ["bytes", "counted", "estimated"])
@pytest.mark.parametrize("name", [*SKEWED, "standard library"])
def test_one_corpus_worth_of_tokens_reads_the_corpus_once(name, tokens, monkeypatch):
    """Bytes are counted by sizes alone; others by encoding all; or are estimated by bytes."""
    if name == "standard library":
        seq_len, world, (sizes, lengths) = 256, 1, standard_library()
    else:
        seq_len, world = 16, 8 if "ranks" in name else 2
        sizes = np.array(SKEWED[name]) * (1 if tokens == "bytes" else 4)
        lengths = sizes // (2 + np.arange(len(sizes)) % 5)  # 2 to 6 bytes a token
    lengths = sizes if tokens == "bytes" else lengths
    source = CountedSource(sizes)
    tokenizer = (NumberedBytes if tokens == "bytes" else NumberedTokens)(lengths)
    if tokens == "estimated":
        many = len(sizes) > 100
        monkeypatch.setattr(corpus_module, "_ENCODED_DOCUMENTS" if many else "ENCODED_BYTES", 0)
    counts, lanes = target_counts(source, tokenizer, seq_len, int((lengths + 2).sum()), world)
    inside = counts[:-2]
    unread, twice = (inside == 0).mean(), (inside > 1).mean()
    window = lanes * (seq_len + 2) / len(inside)  # the last tokens of a lane fill no window
    print(f"| {name} | {tokens} | {unread:.1%} | {twice:.1%} | {window:.1%} |")
    assert counts[tokenizer.bos_id] == 0
    if tokens == "estimated":
        assert unread < 0.25 and inside.max() <= 2
        assert source.reads <= world * (len(source) + 2 * lanes)  # not counted before
    else:
        assert inside.max() == 1
        assert unread <= window
        assert len(source) - counts[tokenizer.eos_id] <= lanes * (seq_len + 2)
        if tokens == "bytes":  # a document that lanes share is encoded once a rank
            assert source.reads <= world * (len(source) + 2 * lanes)
        if name == "one document alone" and tokens == "bytes":
            assert source.reads <= 2 * world


@pytest.mark.parametrize("num_lanes", [1, 2, 7, 64])
@pytest.mark.parametrize("name", SKEWED)
def test_an_epochs_stretches_hold_every_target_once_whatever_the_sizes(name, num_lanes):
    lengths = np.array(SKEWED[name]) // 4
    tokenizer = NumberedTokens(lengths)
    source = CountedSource(lengths)
    corpus = Corpus(source, np.arange(len(source)), tokenizer, seed=3)
    corpus.sizes = 1 + np.random.default_rng(num_lanes).integers(0, 50, len(source))
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for lane in range(num_lanes):
        for document, start, stop, position in corpus_pieces(corpus, lane, num_lanes, {"epoch": 0}):
            if position["epoch"] >= 3:
                break
            if position["epoch"] == 2:
                np.add.at(counts, document.tokens[start + 1 : stop], 1)
    assert (counts[:-2] == 1).all()
    assert counts[tokenizer.eos_id] == len(source)
    assert counts[tokenizer.bos_id] == 0
