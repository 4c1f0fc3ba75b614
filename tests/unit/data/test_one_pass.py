"""Loaders that read a split once, and which documents a split has."""

import itertools

import pytest
from loader_sources import TEXTS, N, S, hub, jsonl, loader, rows

from torchtitan_mtp.data.order import split_documents
from torchtitan_mtp.data.targets import IGNORE, PADDING, make_batch


def one_pass(source, rank=0, world=1, batch=2, **kwargs):
    return list(loader(source, rank, world, batch, infinite=False, **kwargs))


def in_global_order(windows_of_ranks):
    by_rank = [[row for window in windows for row in rows(window)] for windows in windows_of_ranks]
    merged = list(itertools.chain.from_iterable(zip(*by_rank, strict=True)))
    return [row for row in merged if row[1][0] != PADDING]


@pytest.mark.parametrize("kind", [jsonl, hub])
@pytest.mark.parametrize("world", [1, 3, 4, 64])
def test_one_pass_covers_everything_once_on_any_ranks(kind, world, tmp_path):
    source = kind(tmp_path)
    passes = [one_pass(source, r, world) for r in range(world)]
    assert len({len(windows) for windows in passes}) == 1
    windows = in_global_order(passes)
    assert windows == in_global_order([one_pass(source)])
    order = TEXTS if kind is jsonl else [t for i in range(16) for t in TEXTS[i::16]]
    stream = [t for text in order for t in [256, *text.encode(), 257]]
    padded = stream + [0] * (S + N)
    assert [w[0] for w in windows] == [padded[i : i + S + N] for i in range(0, len(stream) - 1, S)]
    last = windows[-1]
    real = len(stream) - (len(windows) - 1) * S
    assert [doc == PADDING for doc in last[1]] == [i >= real for i in range(S + N)]


def test_one_pass_again_is_the_same(source):
    finite = loader(source, infinite=False, batch=2)
    first, second = ([rows(w) for w in finite] for _ in range(2))
    assert first == second
    assert len(first) > 10


def test_padding_windows_have_no_targets(tmp_path):
    windows = one_pass(jsonl(tmp_path, ["ab"]), rank=3, world=4)
    assert len(windows) == 1
    assert (make_batch(windows[0], N).labels == IGNORE).all()


def test_held_out_documents_are_not_trained_on(source):
    kwargs = {"validation_fraction": 0.2}
    held_out = [w[0] for w in in_global_order([one_pass(source, split="validation", **kwargs)])]
    trained = [w[0] for w in in_global_order([one_pass(source, split="train", **kwargs)])]

    def numbers(windows):
        tokens = [t for w in windows for t in w[:S]]
        text = bytes(t if t < 256 else 10 for t in tokens).decode()
        return {
            line.split(">")[0] for line in text.split("\n") if line.startswith("<") and ">" in line
        }

    assert not numbers(held_out) & numbers(trained)
    assert len(numbers(held_out) | numbers(trained)) == len(TEXTS)
    assert 5 < len(numbers(held_out)) < 40


def test_split_parts_are_disjoint_and_complete():
    for count in (2, 3, 10, 1000):
        for fraction in (1e-9, 0.05, 0.5, 0.999999):
            train = split_documents(count, "train", fraction, 1, "x").tolist()
            held = split_documents(count, "validation", fraction, 1, "x").tolist()
            assert sorted(train + held) == list(range(count))
            assert train
            assert held
            assert train == sorted(train)
    held = split_documents(10_000, "validation", 0.05, 1, "x")
    assert 400 < len(held) < 600
    assert held.tolist() != split_documents(10_000, "validation", 0.05, 2, "x").tolist()
    assert split_documents(5, "all", 0.5, 1, "x").tolist() == [0, 1, 2, 3, 4]
    assert split_documents(5, "train", 0.0, 1, "x").tolist() == [0, 1, 2, 3, 4]
    assert split_documents(1, "train", 0.5, 1, "x").tolist() == [0]
