import json
import sys
import types

import pytest
from fake_hub import FakeIterableDataset

from torchtitan_mtp.data.document import Document
from torchtitan_mtp.data.hub import StreamSource
from torchtitan_mtp.data.sources import build_source
from torchtitan_mtp.errors import UserError

RECORDS = [[{"text": f"{shard}.{i}"} for i in range(5)] for shard in range(6)]


def fake(tmp_path):
    return FakeIterableDataset(RECORDS)


def real(tmp_path):
    datasets = pytest.importorskip("datasets")
    for shard, records in enumerate(RECORDS):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / f"{shard}.jsonl").write_text(lines)
    files = [str(path) for path in sorted(tmp_path.glob("*.jsonl"))]
    return datasets.load_dataset("json", data_files=files, split="train", streaming=True)


@pytest.fixture(params=[fake, real])
def stream(request, tmp_path):
    return StreamSource("org/name", dataset=request.param(tmp_path))


def documents(stream, *lane):
    return [document for _, document, _ in stream.read(*lane)]


@pytest.mark.parametrize("num_lanes", [1, 2, 4, 6, 7, 10])
def test_lanes_share_out_every_document(stream, num_lanes):
    assert stream.num_shards == 6
    lanes = [[d.text for d in documents(stream, i, num_lanes)] for i in range(num_lanes)]
    everything = [record["text"] for records in RECORDS for record in records]
    assert sorted(text for lane in lanes for text in lane) == everything
    assert all(lanes)
    if num_lanes > 6:  # fewer files than lanes: every num_lanes-th record
        assert lanes == [everything[i::num_lanes] for i in range(num_lanes)]


@pytest.mark.parametrize("num_lanes", [2, 7])
def test_a_state_goes_on_at_the_next_document(stream, num_lanes):
    texts = [document.text for document in documents(stream, 1, num_lanes)]
    assert len(texts) > 3
    for done, (state, document, _) in enumerate(stream.read(1, num_lanes)):
        assert document.text == texts[done]
        resumed = list(stream.read(1, num_lanes, json.loads(json.dumps(state))))
        assert [document.text for _, document, _ in resumed] == texts[done:]
        assert resumed[0][0] == state


def test_prompts():
    records = [[{"prompt": "a", "completion": "b"}]]
    stream = StreamSource("org/name", dataset=FakeIterableDataset(records))
    assert documents(stream) == [Document("b", prompt="a")]


def test_wrong_records():
    stream = StreamSource("org/name", dataset=FakeIterableDataset([[{"body": "x"}]]))
    with pytest.raises(
        UserError, match=r"expected an object with a string 'text'.*{'body': 'str'}"
    ):
        next(stream.read())


def test_wrong_records_are_left_out_when_asked_and_told_once(caplog):
    shard = [{"text": "a"}, {"body": "x"}, {"text": None}, {"text": "b"}]
    data = FakeIterableDataset([shard])
    stream = StreamSource("org/name", dataset=data, bad_records="skip")
    assert documents(stream) == [Document("a"), Document("b")]
    assert [x.getMessage() for x in caplog.records] == [
        "bad records are left out, the first: org/name: record 1: expected an object with a string"
        " 'text', strings 'prompt' and 'completion', or 'messages'; found {'body': 'str'}"
    ]


def test_a_failing_network_is_one_line():
    shards = [[{"text": "x"}, ConnectionError("reset\nby peer")]]
    lane = StreamSource("org/name", dataset=FakeIterableDataset(shards)).read()
    next(lane)
    message = r"reading record 1 failed: ConnectionError: reset by peer; resume"
    with pytest.raises(UserError, match=message):
        next(lane)


def test_names_and_failures_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(path, **kwargs):
        asked.append((path, kwargs["name"], kwargs["split"], kwargs["streaming"]))
        if path == "org/absent":
            raise FileNotFoundError("Couldn't reach it\n  on the Hub")
        return FakeIterableDataset(RECORDS)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    prints = {build_source(name).fingerprint for name in ("c4", "c4_validation", "fineweb", "a/b")}
    assert asked == [
        ("allenai/c4", "en", "train", True),
        ("allenai/c4", "en", "validation", True),
        ("HuggingFaceFW/fineweb", "default", "train", True),
        ("a/b", None, "train", True),
    ]
    assert len(prints) == 4
    message = r"dataset org/absent: can't open .*FileNotFoundError: Couldn't reach it on the Hub;"
    with pytest.raises(UserError, match=message):
        build_source("org/absent")
    with pytest.raises(UserError, match="or give dataset_path local"):  # validation's has the name
        build_source("org/absent", key="validation.dataset_path")
