"""Loaders that go on epoch after epoch: windows, lanes, ranks and resuming."""

import json

import numpy as np
import pytest
from loader_sources import (
    EPOCHS,
    KINDS,
    TEXTS,
    TOKENIZER,
    N,
    S,
    draw,
    hub,
    hub_of_one_file,
    jsonl,
    loader,
    mixture,
    naive_lane,
    parquet,
    rows,
)

from torchtitan_mtp.data.loader import DataLoader, default_num_lanes, merge_states
from torchtitan_mtp.data.order import shuffled, split_documents
from torchtitan_mtp.data.sources import build_source
from torchtitan_mtp.data.targets import IGNORE, make_batch


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
    """A position written before there were segments: six documents, one a lane, 20 windows."""
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


def epoch_of(drawn):
    return min(at["epoch"] for lane in drawn.state_dict()["lanes"].values() for at in lane)


def test_epochs_are_whole_and_each_in_its_own_order(tmp_path):
    texts = [f"{i:02}" + "." * 12 for i in range(20)]  # 16 tokens each: a window a document
    drawn = loader(jsonl(tmp_path, texts))
    state = drawn.state_dict()
    state["num_lanes"] = 2
    state["lanes"] = {key: state["lanes"][key] for key in ("0", "1")}
    drawn.load_state_dict(state)
    orders = []
    for epoch in range(4):
        assert epoch_of(drawn) == epoch
        windows = [drawn.next_window().tokens[0, 1:3].tolist() for _ in range(20)]
        orders.append([int(bytes(w)) for w in windows])
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert epoch_of(drawn) == 4


def test_stream_epochs(tmp_path):
    drawn = loader(hub(tmp_path))
    tokens = sum(len(text.encode()) + 2 for text in TEXTS)
    seen = set()
    for _ in range(16 * (3 * tokens // (16 * S))):
        seen.add(epoch_of(drawn))
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
