"""Folders that `datasets` saves (save_to_disk): Arrow streams, and state.json, which names them."""

import json
import os

import datasets
import pyarrow
import pytest
from loader_sources import TEXTS, draw, jsonl, loader

from torchtitan_mtp.data import folders
from torchtitan_mtp.data.document import Document
from torchtitan_mtp.data.sources import build_source
from torchtitan_mtp.errors import UserError

MESSAGES = [
    [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "é" * i}]
    for i in range(5)
]
TOOLS = [{"name": "sum"}]


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def save(folder, columns, shards=2, batch=8):
    """`batch`: rows of a record batch."""
    made = datasets.Dataset.from_dict(columns)
    made.save_to_disk(str(folder), num_shards=shards)
    for path in folder.glob("*.arrow"):  # as large datasets have several
        with pyarrow.OSFile(str(path)) as file:
            table = pyarrow.ipc.open_stream(file).read_all()
        with pyarrow.ipc.new_stream(str(path), table.schema) as out:
            out.write_table(table, max_chunksize=batch)
    return folder


def read(source):
    return [source[i] for i in range(len(source))]


def test_documents_are_those_that_were_saved(tmp_path):
    folder = save(tmp_path / "saved", {"text": TEXTS, "id": list(range(len(TEXTS)))}, shards=3)
    source = build_source("files", str(folder))
    assert [d.text for d in read(source)] == TEXTS == list(datasets.load_from_disk(folder)["text"])
    order = [89, 0, 31, 30, 29, 88, 1]
    assert [source[i].text for i in order] == [TEXTS[i] for i in order]
    assert source.where(31).endswith("data-00001-of-00003.arrow: row 2")
    assert source.sizes().tolist() == [len(text) for text in TEXTS]
    again = save(tmp_path / "again", {"text": TEXTS, "id": list(range(len(TEXTS)))}, shards=3)
    assert build_source("files", str(again)).fingerprint == source.fingerprint


def test_windows_are_those_of_the_same_records_in_lines(tmp_path):
    saved = build_source("files", str(save(tmp_path / "saved", {"text": TEXTS})))
    (tmp_path / "lines").mkdir()
    lines = jsonl(tmp_path / "lines")
    first = loader(saved)
    expected = draw([loader(lines)], 90)
    assert draw([first], 40) == expected[:40]
    again = loader(build_source("files", str(tmp_path / "saved")))
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert draw([again], 50) == expected[40:]


def test_messages_and_tools(tmp_path):
    columns = {"messages": MESSAGES, "tools": [json.dumps(TOOLS)] * 5, "prompt": ["x"] * 5}
    source = build_source("files", str(save(tmp_path / "saved", columns)))
    assert source.has_conversations
    found = [json.loads(d.conversation) for d in read(source)]
    assert found == [{"messages": m, "tools": TOOLS} for m in MESSAGES]
    named = {"chats": MESSAGES, "text": ["t"] * 5}
    folder = str(save(tmp_path / "named", named))
    assert read(build_source("files", folder)) == [Document("t")] * 5
    chats = read(build_source("files", folder, text_field="chats"))
    assert [json.loads(d.conversation)["messages"] for d in chats] == MESSAGES


def test_splits_of_a_dict_of_datasets(tmp_path):
    parts = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path))
    assert [d.text for d in read(build_source("files", str(tmp_path)))] == ["train"]
    validation = build_source("files", str(tmp_path), split="validation")
    assert [d.text for d in read(validation)] == ["test"]
    assert [d.text for d in read(build_source("files", str(tmp_path / "test")))] == ["test"]


def test_only_what_state_json_names_is_data(tmp_path):
    """datasets puts caches of map and filter beside what it has saved."""
    folder = save(tmp_path / "saved", {"text": ["a", "b"]})
    (folder / "cache-0123.arrow").write_bytes((folder / "data-00000-of-00002.arrow").read_bytes())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "state.json").write_text('{"step": 3}')
    (tmp_path / "other" / "x.txt").write_text("c")
    _, paths, left_out = folders.find_files(str(tmp_path), "train", set(), "key")
    names = [path.name for path in paths]
    assert names == ["x.txt", "data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert "4 of other kinds" in left_out  # the cache, dataset_info.json, both state.json
    assert [d.text for d in read(build_source("files", str(folder / "*1-of*.arrow")))] == ["b"]


def test_what_is_missing_or_damaged(tmp_path):
    folder = save(tmp_path / "saved", {"text": TEXTS, "id": list(range(len(TEXTS)))})
    part = folder / "data-00001-of-00002.arrow"
    content = part.read_bytes()
    part.unlink()
    with pytest.raises(UserError, match=r"00001-of-00002\.arrow: can't be read: No such file"):
        build_source("files", str(folder))
    for damaged in (content[: len(content) // 2], b"ARROW1", b"no Arrow at all", content[100:]):
        part.write_bytes(damaged)
        with pytest.raises(
            UserError, match=r"00001-of-00002\.arrow: not a readable Parquet file or Arrow"
        ):
            build_source("files", str(folder))
    part.write_bytes(content)
    source = build_source("files", str(folder))
    os.truncate(part, 100)
    with pytest.raises(UserError, match="bytes when the run began, 100 now"):
        source[80]
    with pytest.raises(UserError, match=r"expected one column of strings 'body', .*found \['id'"):
        build_source("files", str(folder / "data-00000-of-00002.arrow"), text_field="body")


def test_bad_records(tmp_path):
    messages = [MESSAGES[0], [{"role": "user", "content": "q"}], None, MESSAGES[1]]
    folder = str(save(tmp_path / "saved", {"messages": messages}, shards=1))
    with pytest.raises(UserError, match=r"\.arrow: row 2: .* found no answer of an 'assistant'"):
        build_source("files", folder)
    source = build_source("files", folder, bad_records="skip")
    assert (source.sizes() == -1).tolist() == [False, True, True, False]
    save(tmp_path / "texts", {"text": ["a", None]}, shards=1)
    with pytest.raises(UserError, match=r"\.arrow: row 2: .* found {'text': 'NoneType'}"):
        build_source("files", str(tmp_path / "texts"))
