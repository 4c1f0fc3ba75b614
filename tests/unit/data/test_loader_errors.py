"""What a loader refuses, and files that are bad or mended under a run."""

import json
import os

import pytest
from loader_sources import (
    EPOCHS,
    TEXTS,
    TOKENIZER,
    N,
    S,
    draw,
    hub,
    hub_of_one_file,
    jsonl,
    loader,
    naive_lane,
    parquet,
    rows,
    text_folder,
)

from torchtitan_mtp.data.loader import DataLoader, merge_states
from torchtitan_mtp.data.order import split_documents
from torchtitan_mtp.data.sources import build_source
from torchtitan_mtp.data.tokenizer import ByteTokenizer
from torchtitan_mtp.errors import UserError


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
