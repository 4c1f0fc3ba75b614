import functools
import gzip
import io
import itertools
import json
import os

import numpy as np
import pytest
import torch
from fake_hub import FakeIterableDataset

from torchtitan_mtp.data.hub import StreamSource
from torchtitan_mtp.data.loader import DataLoader, default_num_lanes, merge_states
from torchtitan_mtp.data.mixture import Mixture
from torchtitan_mtp.data.order import shuffled, split_documents
from torchtitan_mtp.data.sources import build_source
from torchtitan_mtp.data.targets import IGNORE, PADDING, make_batch
from torchtitan_mtp.data.tokenizer import ByteTokenizer
from torchtitan_mtp.errors import UserError

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


@pytest.fixture
def source(tmp_path):
    return jsonl(tmp_path)


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
        stretch = (lane + epoch) % num_lanes
        start, stop = (len(stream) * i // num_lanes for i in (stretch, stretch + 1))
        inside = 0 < stop < len(stream) and stream[stop][1] == stream[stop - 1][1]
        for _, same in itertools.groupby(stream[start : stop + inside], lambda item: item[1]):
            part = [token for token, _ in same]
            tokens += part
            pieces += [piece] * len(part)
            piece += 1
    return tokens, pieces


def naive_dealt_lane(source, lane, num_lanes, seed, epochs):
    """The same for lanes that were dealt whole documents, as states of version 1 are."""
    tokens, docs = [], []
    for epoch in range(epochs):
        for number in shuffled(np.arange(len(source))[lane::num_lanes], seed, lane, epoch):
            text = [TOKENIZER.bos_id, *source[int(number)].text.encode(), TOKENIZER.eos_id]
            docs += [(docs[-1] + 1 if docs else 0)] * len(text)
            tokens += text
    return tokens, docs


def test_windows_equal_the_naive_lanes(source):
    windows = draw([loader(source)], 64 * 8)
    lanes = [naive_lane(source, lane, 64, 5, epochs=EPOCHS) for lane in range(64)]
    for g, (tokens, doc_ids, _) in enumerate(windows):
        lane_tokens, lane_docs = lanes[g % 64]
        start = g // 64 * S
        assert tokens == lane_tokens[start : start + S + N]
        expected = lane_docs[start : start + S + N]
        assert doc_ids == [doc - expected[0] for doc in expected]


def test_every_next_token_pair_is_a_target_exactly_once(source):
    num_lanes, count = 64, 8
    pairs = {lane: [] for lane in range(num_lanes)}
    drawn = loader(source)
    for g in range(num_lanes * count):
        batch = make_batch(drawn.next_window(), N)
        pairs[g % num_lanes] += zip(batch.tokens[0].tolist(), batch.labels[0].tolist(), strict=True)
    for lane in range(num_lanes):
        tokens, docs = naive_lane(source, lane, num_lanes, 5, epochs=EPOCHS)
        for i, (token, labels) in enumerate(pairs[lane]):
            assert token == tokens[i]
            expected = [
                tokens[i + k] if docs[i + k] == docs[i] else IGNORE for k in range(1, N + 1)
            ]
            assert labels == expected
        assert len(pairs[lane]) == S * count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 4])
def test_same_global_batches_for_any_number_of_ranks(kind, world, tmp_path):
    source = kind(tmp_path)
    alone = loader(source, batch=4)
    if kind is hub_of_one_file:  # its lanes are the ranks that it began with
        first = loader(source, 0, world)
        alone.load_state_dict(
            merge_states(loader(source, r, world).state_dict() for r in range(world))
        )
        assert first.state_dict()["num_lanes"] == world
    ranks = [loader(source, r, world, batch=2) for r in range(world)]
    assert draw([alone], 96, batch=4) == draw(ranks, 96, batch=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("done", [4, 76, 512])
def test_resume_equals_going_on(kind, done, tmp_path):
    source = kind(tmp_path)
    going = loader(source)
    draw([going], done)
    state = json.loads(json.dumps(going.state_dict()))
    expected = draw([going], 160)
    resumed = loader(kind(tmp_path))
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert draw([resumed], 160) == expected


@pytest.mark.parametrize("kind", [jsonl, parquet, hub, mixture])
@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 1), (1, 8), (4, 4)])
def test_resume_on_other_ranks(kind, before, after, tmp_path):
    source = kind(tmp_path)
    ranks = [loader(source, r, before, batch=2) for r in range(before)]
    draw(ranks, 48, batch=2)
    state = json.loads(json.dumps(merge_states(x.state_dict() for x in ranks)))
    assert state["next_window"] == 48
    expected = draw(ranks, 96, batch=2)
    resumed = [loader(kind(tmp_path), r, after, batch=3) for r in range(after)]
    for x in resumed:
        x.load_state_dict(state)
    assert draw(resumed, 96, batch=3) == expected[: 96 // (3 * after) * 3 * after]


def test_lanes_that_were_dealt_documents_go_on_so(tmp_path):
    """A position written before stretches were: six documents, one a lane, 20 windows drawn."""
    source = jsonl(tmp_path, TEXTS[:6])
    places = [(12, 4), (5, 4), (2, 10), (1, 22), (1, 15), (1, 8)]
    state = {
        "version": 1,
        "source": "3bb1aec260f248182828ad841e2a7d04fe1aa794fc44ffb4b1d09b4fb526f169:text",
        "tokenizer": "byte",
        "seed": 5,
        "held_out": 0.0,
        "num_lanes": 6,
        "next_window": 20,
        "lanes": {
            str(lane): {"epoch": epoch, "index": 0, "offset": offset}
            for lane, (epoch, offset) in enumerate(places)
        },
    }
    ranks = [loader(source, r, 2) for r in range(2)]
    for made in ranks:
        made.load_state_dict(state)
    windows = draw(ranks, 60)
    for g, (tokens, doc_ids, _) in enumerate(windows, 20):
        lane_tokens, lane_docs = naive_dealt_lane(source, g % 6, 6, 5, epochs=60)
        span = slice(g // 6 * S, g // 6 * S + S + N)
        assert tokens == lane_tokens[span]
        assert doc_ids == [doc - lane_docs[span.start] for doc in lane_docs[span]]
    again = json.loads(json.dumps(merge_states(made.state_dict() for made in ranks)))
    assert again["version"] == 1
    alone = loader(source)
    alone.load_state_dict(again)
    assert draw([alone], 12) == draw(ranks, 12)


def test_resume_where_the_next_window_is_not_rank_zeros(source):
    going = loader(source)
    draw([going], 5)
    state = going.state_dict()
    expected = draw([going], 8)
    ranks = [loader(source, r, 2) for r in range(2)]
    for x in ranks:
        x.load_state_dict(state)
    even, odd = draw([ranks[0]], 4), draw([ranks[1]], 4)  # windows 6, 8, ... and 5, 7, ...
    assert [x for pair in zip(odd, even, strict=True) for x in pair] == expected
    again = [loader(source, r, 2) for r in range(2)]
    for x in again:
        x.load_state_dict(state)
    assert merge_states(x.state_dict() for x in again)["next_window"] == 5


def test_resume_with_another_sequence_length_goes_on_at_the_same_token(source):
    going = loader(source)
    draw([going], 64 * 3)
    longer = DataLoader(source, TOKENIZER, 40, 5, 1, seed=5, split="all", prefetch=0)
    longer.load_state_dict(going.state_dict())
    for lane in range(64):
        tokens, _ = naive_lane(source, lane, 64, 5, epochs=EPOCHS)
        assert longer.next_window().tokens[0].tolist() == tokens[3 * S : 3 * S + 45]


def test_state_is_of_the_last_window_handed_out(source):
    plain, ahead = loader(source, batch=2), loader(source, batch=2, prefetch=3)
    assert ahead.state_dict() == plain.state_dict()
    for _ in range(50):
        assert rows(ahead.next_window()) == rows(plain.next_window())
        assert ahead.state_dict() == plain.state_dict()
    ahead.close()
    assert ahead.state_dict() == plain.state_dict()
    assert rows(ahead.next_window()) == rows(plain.next_window())  # goes on after a close
    state = plain.state_dict()
    draw([ahead], 40, batch=2)
    ahead.load_state_dict(state)
    assert draw([ahead], 40, batch=2) == draw([plain], 40, batch=2)
    ahead.close()


def test_a_state_does_not_change_as_the_loader_goes_on(source):
    going = loader(source)
    draw([going], 7)
    state = going.state_dict()
    copy = json.loads(json.dumps(state))
    draw([going], 200)
    assert state == copy


def test_reading_errors_reach_the_consumer_at_their_window(tmp_path):
    path = tmp_path / "a.jsonl"
    good = json.dumps({"text": "x" * 200})
    path.write_text(f"{good}\n" * 4)
    source = build_source("files", str(path))
    bad = f"{good}\n" * 3 + "{".ljust(len(good)) + "\n"
    times = path.stat()
    path.write_text(bad)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # by one who hides it
    ahead = loader(source, prefetch=2)
    with pytest.raises(UserError, match=r"a\.jsonl:4: changed under the run: not JSON"):
        for _ in range(20):
            before = ahead.state_dict()
            ahead.next_window()
    assert ahead.state_dict() == before
    with pytest.raises(UserError, match=r"a\.jsonl:4: changed under the run: not JSON"):
        ahead.next_window()
    ahead.close()


def test_epochs_are_whole_and_each_in_its_own_order(tmp_path):
    texts = [f"{i:02}" + "." * 12 for i in range(20)]  # 16 tokens each: a window a document
    drawn = loader(jsonl(tmp_path, texts))
    state = drawn.state_dict()
    state["num_lanes"] = 2
    state["lanes"] = {key: state["lanes"][key] for key in ("0", "1")}
    drawn.load_state_dict(state)
    orders = []
    for epoch in range(4):
        assert drawn.epoch == epoch
        windows = [drawn.next_window().tokens[0, 1:3].tolist() for _ in range(20)]
        orders.append([int(bytes(w)) for w in windows])
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert drawn.epoch == 4


def test_stream_epochs(tmp_path):
    drawn = loader(hub(tmp_path))
    tokens = sum(len(text.encode()) + 2 for text in TEXTS)
    seen = set()
    for _ in range(16 * (3 * tokens // (16 * S))):
        seen.add(drawn.epoch)
        drawn.next_window()
    assert seen >= {0, 1, 2}


def test_seed_changes_the_order(source):
    assert draw([loader(source, seed=1)], 64) != draw([loader(source, seed=2)], 64)


def test_prompts_are_read_but_no_targets(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "2+2=", "completion": "4."}) + "\n")
    window = loader(build_source("files", str(path))).next_window()
    tokens = [256, *b"2+2=4.", 257] * 3
    assert window.tokens[0].tolist() == tokens[: S + N]
    allowed = ([False] * 5 + [True] * 3) * 3
    assert window.loss_mask[0].tolist() == allowed[: S + N]
    labels = make_batch(window, N).labels[0]
    assert labels[:8, 0].tolist() == [IGNORE] * 4 + [ord("4"), ord("."), 257, IGNORE]
    assert labels[2].tolist() == [IGNORE, IGNORE, ord("4")]


def test_no_mask_where_nothing_is_masked(source):
    assert loader(source, batch=4).next_window().loss_mask is None


# ------------------------------------------------------------------ one pass


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


def test_a_finite_loader_is_only_iterated(source):
    finite = loader(source, infinite=False)
    for use in (finite.next_window, finite.state_dict, lambda: finite.load_state_dict({})):
        with pytest.raises(RuntimeError, match="finite loader"):
            use()
    with pytest.raises(RuntimeError, match="finite loader"):
        _ = finite.epoch
    finite.close()


# ------------------------------------------------------------------ split and lanes


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


def test_the_order_never_changes():
    # Written down once: a resumed run depends on it, in every version of this package and of numpy.
    dealt_to_lane_0 = [5, 1, 4, 3, 8, 7, 6, 0, 2, 9]  # by seed, lane, epoch
    assert shuffled(np.arange(10), 0, 0, 0).tolist() == dealt_to_lane_0
    assert shuffled(np.arange(10), 0, 0).tolist() == [3, 6, 4, 0, 8, 7, 5, 1, 9, 2]
    assert split_documents(100, "validation", 0.05, 0, "x").tolist() == [9, 22, 88, 90]


@pytest.mark.parametrize(
    ("most", "world", "lanes"),
    [(1000, 1, 64), (1000, 8, 64), (1000, 3, 48), (1000, 100, 100), (10, 4, 8), (0, 5, 5)],
)
def test_default_number_of_lanes(most, world, lanes):
    assert default_num_lanes(most, world) == lanes


# ------------------------------------------------------------------ errors


def test_nothing_to_hold_out(tmp_path):
    source = jsonl(tmp_path, ["only one"])
    assert loader(source, split="train").next_window().tokens.shape == (1, S + N)
    with pytest.raises(
        UserError, match=r"1 document, so none can be held out.*validation\.dataset"
    ):
        loader(source, split="validation")
    with pytest.raises(UserError, match=r"training\.validation_fraction = 0, so none"):
        loader(jsonl(tmp_path), split="validation", validation_fraction=0.0)
    with pytest.raises(UserError, match="nothing can be held out of a stream"):
        loader(hub(tmp_path), split="validation")


def test_state_of_other_data_is_refused(source, tmp_path):
    state = loader(source).state_dict()
    (tmp_path / "other").mkdir()
    other = jsonl(tmp_path / "other", TEXTS[1:])
    with pytest.raises(UserError, match="the checkpoint's data position has source '") as error:
        loader(other).load_state_dict(state)
    assert "\n" not in str(error.value)
    assert "exclude_from_loading" in str(error.value)
    with pytest.raises(UserError, match="has seed 5, this run has 6"):
        loader(source, seed=6).load_state_dict(state)
    with pytest.raises(UserError, match=r"has held_out 0\.0, this run has 0\.05: put back valid"):
        loader(source, split="train").load_state_dict(state)
    loader(source, validation_fraction=0.2).load_state_dict(state)  # nothing is held out of "all"
    with pytest.raises(UserError, match="has tokenizer"):
        loader(source).load_state_dict({**state, "tokenizer": "tiktoken:x"})
    with pytest.raises(UserError, match="has version 3, this package reads 1 and 2"):
        loader(source).load_state_dict({**state, "version": 3})


def test_ranks_that_do_not_divide_the_lanes(source):
    state = loader(source).state_dict()
    message = r"64 lanes, which can't be dealt to 3 data ranks; resume on one of \[1, 2, 4, 8, 16"
    with pytest.raises(UserError, match=message):
        loader(source, 0, 3).load_state_dict(state)


def test_one_ranks_state_alone_is_refused(source):
    state = loader(source, 0, 2).state_dict()
    with pytest.raises(UserError, match="lacks lane 1 of 64"):
        loader(source).load_state_dict(state)


def test_states_of_different_runs_are_not_merged(source):
    states = [loader(source, 0, 2).state_dict(), loader(source, 1, 2, seed=6).state_dict()]
    with pytest.raises(ValueError, match="different runs"):
        merge_states(states)
    with pytest.raises(ValueError, match="no loader state"):
        merge_states([])


@pytest.mark.parametrize(
    "wrong",
    [{"rank": 2, "world": 2}, {"batch": 0}, {"split": "test"}, {"validation_fraction": 1.0}],
)
def test_wrong_arguments(source, wrong):
    with pytest.raises(ValueError, match=r"rank|positive|split"):
        loader(source, **wrong)


class PanickingTokenizer(ByteTokenizer):
    """Fails as tokenizers written in Rust do: pyo3's PanicException is a BaseException."""

    def encode(self, text):
        if text == TEXTS[40]:
            raise type("PanicException", (BaseException,), {})("called unwrap() on\nan Err value")
        return super().encode(text)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("infinite", [True, False])
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize(
    ("kind", "place"),
    [
        (jsonl, r"a\.jsonl:41"),
        (text_folder, r"040\.txt:1"),
        (parquet, r"a\.parquet: row 41"),
        (hub_of_one_file, r"org/name: record 40"),
    ],
)
def test_whatever_a_tokenizer_dies_of_names_the_document(tmp_path, kind, place, infinite, prefetch):
    source = kind(tmp_path)
    made = DataLoader(
        source, PanickingTokenizer(), S, N, 1, split="all", infinite=infinite, prefetch=prefetch
    )
    failure = rf"{place}: the tokenizer fails on this document \(PanicException: called unwrap"
    with pytest.raises(UserError, match=failure):
        for _ in made:
            pass
    made.close()


@pytest.mark.parametrize("kind", [jsonl, parquet])
def test_a_mended_file_is_accepted_when_asked_and_the_position_kept(tmp_path, kind):
    def mended(texts, accept=True):
        return loader(kind(tmp_path, texts), accept_changed_data=accept)

    # The last bytes of a document of 40 become others; the positions are the same.
    changed = [text[:-3] + "new" if len(text) > 40 else text for text in TEXTS]
    assert changed != TEXTS
    before = mended(TEXTS)
    for _ in range(80):
        before.next_window()
    state = before.state_dict()
    expected = mended(changed)
    for _ in range(80):
        expected.next_window()
    with pytest.raises(UserError, match=r"position has source .* --training.accept_changed_data"):
        mended(changed, accept=False).load_state_dict(state)
    resumed = mended(changed)
    resumed.load_state_dict(state)
    for _ in range(300):
        assert rows(resumed.next_window()) == rows(expected.next_window())
    again = mended(changed, accept=False)
    again.load_state_dict(resumed.state_dict())
    with pytest.raises(UserError, match="position has documents 90, this run has 89"):
        mended(changed[1:]).load_state_dict(state)


@pytest.mark.parametrize("kind", [jsonl, parquet])
def test_a_skipped_record_is_no_document_and_keeps_its_number(tmp_path, kind):
    """So the file can be mended under a run that skips, and its positions mean the same."""
    bad = [0, 17, 40, 88, 89]
    texts = [None if i in bad else text for i, text in enumerate(TEXTS)]
    source = kind(tmp_path, texts, bad_records="skip")
    before = loader(source)
    windows = draw([before], 64 * 6)
    for lane in range(64):
        tokens, _ = naive_lane(source, lane, 64, 5, epochs=EPOCHS)
        for turn, row in enumerate(windows[lane::64]):
            assert row[0] == tokens[turn * S : turn * S + S + N]
    # Both splits in order, without them: one pass.
    for split in ("train", "validation"):
        numbers = split_documents(len(TEXTS), split, 0.2, 5, "x")
        expected = [
            token
            for i in numbers
            if i not in bad
            for token in (TOKENIZER.bos_id, *TEXTS[i].encode(), TOKENIZER.eos_id)
        ]
        once = loader(source, split=split, validation_fraction=0.2, infinite=False)
        found = [t for row in map(rows, once) for t, d in zip(*row[0][:2], strict=True) if d >= 0]
        starts = range(0, len(expected) - 1, S)
        assert found == [t for i in starts for t in expected[i : i + S + N]]

    state = before.state_dict()
    assert state["documents"] == len(TEXTS)
    mended = kind(tmp_path, [text or "mended" for text in texts[:-1]] + [None], bad_records="skip")
    resumed = loader(mended, accept_changed_data=True)
    resumed.load_state_dict(state)
    assert resumed.state_dict()["lanes"] == state["lanes"]
    read = "".join(TOKENIZER.decode(row[0]) for row in draw([resumed], 64 * 6))
    assert "mended" in read
    held_out = split_documents(len(TEXTS), "validation", 0.01, 5, "x")
    texts = [None if i in held_out else text for i, text in enumerate(TEXTS)]
    with pytest.raises(UserError, match=f"all {len(held_out)} of a split are bad records"):
        empty = kind(tmp_path, texts, bad_records="skip")
        loader(empty, split="validation", validation_fraction=0.01)
