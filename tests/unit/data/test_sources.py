import gzip
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from torchtitan_mtp.data import compressed, files
from torchtitan_mtp.data.document import Document
from torchtitan_mtp.data.sources import build_source
from torchtitan_mtp.data.spans import MAX_CHARACTERS
from torchtitan_mtp.errors import UserError

RECORDS = [{"text": f"record {i} é"} for i in range(7)]


def read(source):
    return [source[i] for i in range(len(source))]


def write_jsonl(path, records=RECORDS):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def assert_fails(message, *args, **kwargs):
    """Building the source, or reading it, raises one line that matches."""
    with pytest.raises(UserError, match=message) as error:
        read(build_source(*args, **kwargs))
    assert "\n" not in str(error.value)


def test_standard_library():
    source = build_source("python_stdlib")
    assert len(source) > 500
    assert source.fingerprint == build_source("python_stdlib").fingerprint
    texts = [document.text for document in read(source)]
    this = Path(os.__file__).read_text(encoding="utf-8")
    assert this in texts
    assert all(texts)
    assert not any("class StringIOTests" in text for text in texts)  # of the tests
    total = sum(len(text.encode()) for text in texts)
    assert 5e6 < total < 50e6, total  # without tests and installed packages


def test_one_text_file_of_any_suffix(tmp_path):
    (tmp_path / "LICENSE").write_text("free as in é")
    assert read(build_source("files", str(tmp_path / "LICENSE"))) == [Document("free as in é")]


def test_folder_reads_known_suffixes_in_sorted_order(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.py", "sub/c.md", "image.png", "weights.json", ".gitignore"):
        (tmp_path / name).write_text(name)
    (tmp_path / "empty.txt").touch()
    write_jsonl(tmp_path / "d.jsonl", RECORDS[:1])
    found = [d.text for d in read(build_source("files", str(tmp_path)))]
    assert found == ["a.py", "b.txt", "record 0 é", "sub/c.md"]


def test_glob(tmp_path):
    for name in ("b.foo", "a.foo", "c.bar"):
        (tmp_path / name).write_text(name)
    source = build_source("c4", str(tmp_path / "**" / "*.foo"))
    assert [d.text for d in read(source)] == ["a.foo", "b.foo"]


@pytest.mark.parametrize("character", ["x", "é", "漢", "🙂"])
@pytest.mark.parametrize("length", [MAX_CHARACTERS, MAX_CHARACTERS + 1, 3 * MAX_CHARACTERS])
def test_long_text_is_cut_at_line_ends(tmp_path, character, length):
    lines = (character * 99 + "\n") * (length // 100 + 1)
    text = lines[:length]
    path = tmp_path / "long.txt"
    path.write_text(text, encoding="utf-8")
    parts = [d.text for d in read(build_source("files", str(path)))]
    assert "".join(parts) == text
    if length == MAX_CHARACTERS:
        assert len(parts) == 1
    assert all(len(part) <= MAX_CHARACTERS for part in parts)
    assert all(part.endswith("\n") for part in parts[:-1])
    assert all(len(part) > MAX_CHARACTERS - 100 for part in parts[:-1])


@pytest.mark.parametrize("character", ["x", "漢", "🙂"])
def test_a_line_beyond_the_limit_is_cut_within(tmp_path, character):
    text = "short\n" + character * (2 * MAX_CHARACTERS + 5) + "\nend"
    path = tmp_path / "long.txt"
    path.write_text(text, encoding="utf-8")
    parts = [d.text for d in read(build_source("files", str(path)))]
    assert "".join(parts) == text
    assert [len(part) for part in parts[1:3]] == [MAX_CHARACTERS] * 2
    assert parts[0] == "short\n"


def test_jsonl_with_blank_lines_and_no_last_line_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\r\n\n  \n{"text": "two", "id": 3}')
    assert read(build_source("files", str(path))) == [Document("one"), Document("two")]


def test_jsonl_prompt_and_completion_and_other_field(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "2+2=", "completion": "4"}])
    assert read(build_source("files", str(path))) == [Document("4", prompt="2+2=")]
    path = write_jsonl(tmp_path / "b.jsonl", [{"content": "x", "text": "y"}])
    assert read(build_source("files", str(path), text_field="content")) == [Document("x")]


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"text": "a\ud800b"}')
    assert read(build_source("files", str(path))) == [Document("a?b")]


def test_long_records_stay_whole(tmp_path):
    long = "line\n" * MAX_CHARACTERS
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": long}])
    assert read(build_source("files", str(path))) == [Document(long)]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("inner", [".jsonl", ".json"])
def test_compressed_records(tmp_path, suffix, inner, cache):
    plain = write_jsonl(tmp_path / f"a{inner}").read_bytes()
    packed = tmp_path / f"c4-train.00000-of-01024{inner}{suffix}"
    if suffix == ".gz":
        packed.write_bytes(gzip.compress(plain))
    else:
        import zstandard

        packed.write_bytes(zstandard.compress(plain))
    (tmp_path / f"a{inner}").unlink()
    for _ in range(2):
        source = build_source("c4", str(tmp_path))
        assert [d.text for d in read(source)] == [r["text"] for r in RECORDS]
        assert len(list(cache.iterdir())) == 1  # made once, no partial file left


def test_damaged_compressed_file(tmp_path, cache):
    packed = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(os.urandom(10_000))
    for data in (whole[:5000], b"not gzip"):
        packed.write_bytes(data)
        assert_fails(r"a\.jsonl\.gz: can't be decompressed", "files", str(packed))
    zstandard = pytest.importorskip("zstandard")
    packed, text = tmp_path / "a.txt.zst", b"".join(b"line %d\n" % i for i in range(100_000))
    whole = zstandard.compress(text)
    stream = zstandard.ZstdCompressor().compressobj()  # its frames don't say how long they are
    streamed = stream.compress(text) + stream.flush()
    cut = [data[: len(data) * i // 8] for data in (whole, streamed) for i in range(1, 8)]
    for data in (b"not zstd", whole[:3], *cut, whole[:-1], whole + whole[:-1], whole + b"more"):
        packed.write_bytes(data)
        assert_fails(r"a\.txt\.zst: can't be decompressed", "files", str(packed))
        assert list(cache.iterdir()) == []
    skipped = b"\x50\x2a\x4d\x18\x02\0\0\0hi"  # a frame of no text, RFC 8878 3.1.2
    packed.write_bytes(whole + skipped + streamed + skipped)
    assert "".join(d.text for d in read(build_source("files", str(packed)))) == 2 * text.decode()


def test_default_cache_folder_is_the_users_own(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    packed = tmp_path / "a.txt.gz"
    packed.write_bytes(gzip.compress(b"hello"))
    assert read(build_source("files", str(packed))) == [Document("hello")]
    folder = tmp_path / f"torchtitan_mtp-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    folder.rename(tmp_path / "torchtitan_mtp-12345")
    assert_fails("belongs to another user", "files", str(packed))


def write_parquet(path, columns, row_group_size=3):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)
    return path


def test_parquet_row_groups_in_any_order(tmp_path):
    texts = [f"row {i}" for i in range(20)]
    path = write_parquet(tmp_path / "a.parquet", {"text": texts, "id": list(range(20))})
    source = build_source("files", str(path))
    assert len(source) == 20
    order = [19, 0, 7, 7, 3, 12, 18, 1, 9, 15]
    assert [source[i].text for i in order] == [texts[i] for i in order]
    columns = {"prompt": ["a"], "completion": ["b"]}
    write_parquet(tmp_path / "b.parquet", columns)
    assert read(build_source("files", str(tmp_path / "b.parquet"))) == [Document("b", "a")]


def test_parquet_errors(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"body": ["x"]})
    assert_fails(
        r"a\.parquet: expected one column of strings 'text', .*found \['body'\]", "files", str(path)
    )
    path = write_parquet(tmp_path / "b.parquet", {"text": ["x", None]})
    assert_fails(
        r"b\.parquet: row 2: expected an object with a string 'text', .*found {'text': 'None",
        "files",
        str(path),
    )
    import pyarrow.parquet

    twice = pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 3, names=["text", "id", "text"])
    pyarrow.parquet.write_table(twice, path)
    message = r"b\.parquet: expected one column .*found \['id', 'text', 'text'\]"
    assert_fails(message, "files", str(path))
    assert [d.text for d in read(build_source("files", str(path), text_field="id"))] == ["x"]
    path = tmp_path / "c.parquet"
    path.write_bytes(b"PAR1 and nothing more")
    assert_fails(r"c\.parquet: not a readable Parquet file", "files", str(path))


def test_parquet_cut_short_under_the_run(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": [f"row {i}" for i in range(20)]})
    source = build_source("files", str(path))
    os.truncate(path, 100)
    with pytest.raises(UserError, match="bytes when the run began, 100 now"):
        source[5]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_file_cut_short_or_gone_under_the_run(tmp_path, name):
    path = write_jsonl(tmp_path / name)
    source = build_source("files", str(path))
    size = path.stat().st_size
    os.truncate(path, 10)
    with pytest.raises(UserError, match=f"{name}: {size} bytes when the run began, 10 now"):
        source[len(source) - 1]
    path.unlink()
    with pytest.raises(UserError, match=f"{name}: can't be read: No such file"):
        source[0]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
@pytest.mark.parametrize("how", ["written", "moved"])
def test_file_replaced_by_one_of_equal_size_under_the_run(tmp_path, name, how):
    def write(path, text):
        if name.endswith("parquet"):
            return write_parquet(path, {"text": [text]})
        return write_jsonl(path, [{"text": text}])

    path = write(tmp_path / name, "one")
    os.utime(path, (2, 2))
    source = build_source("files", str(path))
    size = path.stat().st_size
    other = write(tmp_path / "other", "two")
    os.utime(other, (1, 1))  # older, as a file that was lying there is
    assert other.stat().st_size == size
    if how == "moved":
        other.rename(path)
    else:
        path.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match=rf"{name}: {size} bytes .*, {size} now, and written to"):
        source[0]


def test_not_utf8_names_the_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\nna\xefve\n")
    assert_fails(r"a\.txt:3: byte 0xef is not UTF-8", "files", str(path))
    path.write_bytes(b"line\n" * 100_000 + b"\xff\n")
    assert_fails(r"a\.txt:100001: byte 0xff", "files", str(path))
    path.write_bytes(b"line\n" * 100_000 + b"\xe6\xbc")  # ends within a character
    assert_fails(r"a\.txt:100001: byte 0xe6", "files", str(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a}', r"a\.jsonl:4: not JSON"),
        (b'{"txt": "a"}', r"a\.jsonl:4: expected an object with a string 'text'.*{'txt': 'str'}"),
        (b'{"text": 5}', r"a\.jsonl:4: expected an object"),
        (b'{"prompt": "a"}', r"a\.jsonl:4: expected an object"),
        (b"[1, 2]", r"a\.jsonl:4: expected an object .*found list"),
        (b'{"text": "\xff"}', r"a\.jsonl:4: byte 0xff is not UTF-8"),
    ],
)
def test_bad_record_names_file_and_line(tmp_path, line, message):
    good = b'{"text": "x"}\n'
    (tmp_path / "a.jsonl").write_bytes(good * 2 + b"\n" + line + b"\n" + good)
    assert_fails(message, "files", str(tmp_path / "a.jsonl"))


def test_bad_record_of_a_compressed_file_names_that_file(tmp_path):
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(b"{\n"))
    assert_fails(r"a\.jsonl\.gz:1: not JSON", "files", str(packed))


def test_nothing_there(tmp_path, monkeypatch):
    assert_fails("no file, folder or glob match at", "files", str(tmp_path / "x"))
    assert_fails("no file, folder or glob match", "files", str(tmp_path / "*.txt"))
    monkeypatch.chdir(tmp_path)  # as of a run that was started elsewhere
    where = f"'x/a.jsonl', looked for in {tmp_path}: .* or give the full path"
    assert_fails(where, "files", "x/a.jsonl")
    assert_fails(
        r"no text, \.jsonl or \.parquet file, no saved dataset below", "files", str(tmp_path)
    )
    (tmp_path / "a.txt").touch()
    assert_fails("no document in 1 file", "files", str(tmp_path))


def test_unknown_names():
    assert_fails("'c4_test' is not a dataset here; give the path", "c4_test")
    assert_fails("'' is not a dataset here", "")


def test_missing_packages(tmp_path, monkeypatch):
    for module in ("pyarrow.parquet", "zstandard", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    for name, package in (("a.parquet", "pyarrow"), ("a.txt.zst", "zstandard")):
        (tmp_path / name).write_bytes(b"x")
        assert_fails(f"reading it needs {package}", "files", str(tmp_path / name))
    assert_fails("dataset c4: streaming it needs the datasets package", "c4")


def test_index_out_of_range(tmp_path):
    source = build_source("files", str(write_jsonl(tmp_path / "a.jsonl")))
    for index in (-1, 7):
        with pytest.raises(IndexError):
            source[index]


def fingerprint(path, **kwargs):
    return build_source("files", str(path), **kwargs).fingerprint


def test_fingerprint_follows_names_and_contents_not_places_and_times(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "a.jsonl", [{"text": "x", "body": "y"}])
    os.utime(tmp_path / "two" / "a.jsonl", (1, 1))
    first = fingerprint(tmp_path / "one")
    assert fingerprint(tmp_path / "two") == first
    assert fingerprint(tmp_path / "two", text_field="body") != first
    write_jsonl(tmp_path / "two" / "a.jsonl", [{"text": "z", "body": "y"}])  # same size
    assert fingerprint(tmp_path / "two") != first
    (tmp_path / "one" / "a.jsonl").rename(tmp_path / "one" / "b.jsonl")
    assert fingerprint(tmp_path / "one") != first


def test_fingerprint_of_a_large_corpus_samples_both_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WHOLE_HASH_BYTES", 1000)
    path = tmp_path / "a.txt"
    data = bytearray(b"line\n" * 100_000)
    path.write_bytes(data)
    first = fingerprint(path)
    for place, seen in ((0, True), (250_000, False), (499_990, True)):
        changed = bytearray(data)
        changed[place] = ord("X")
        path.write_bytes(changed)
        assert (fingerprint(path) != first) == seen
    path.write_bytes(data + b"\n")
    assert fingerprint(path) != first


def test_unreadable_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("x")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    source = build_source("files", str(path))
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match=r"a\.txt: can't be read: Permission denied"):
        source[0]


def test_no_room_for_decompressed_contents(tmp_path, monkeypatch, cache):
    packed = tmp_path / "a.txt.gz"
    packed.write_bytes(gzip.compress(b"hello"))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compressed.shutil, "copyfileobj", full)
    assert_fails("No space left on device", "files", str(packed))
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("kind", ["stdlib", "text", "jsonl", "parquet"])
def test_sizes_are_the_bytes_of_each_document(tmp_path, kind):
    texts = [record["text"] for record in RECORDS]
    if kind == "text":
        (tmp_path / "a.txt").write_text("é\n" * 40_000, encoding="utf-8")
        (tmp_path / "b.txt").write_text("x")
        (tmp_path / "c.txt").touch()
    elif kind == "jsonl":
        write_jsonl(tmp_path / "a.jsonl")
        write_jsonl(tmp_path / "b.jsonl", [{"prompt": "é", "completion": t} for t in texts])
    else:
        write_parquet(tmp_path / "a.parquet", {"text": texts})
        write_parquet(tmp_path / "b.parquet", {"prompt": texts[::-1], "completion": texts})
    source = build_source(*(["python_stdlib"] if kind == "stdlib" else ["files", str(tmp_path)]))
    expected = [len((d.prompt + d.text).encode()) for d in read(source)]
    assert source.sizes().dtype == np.int64
    assert source.sizes().tolist() == expected


def not_utf8_column():
    import pyarrow

    cells = pyarrow.array([b"ok", b"na\xefve", b"so"])
    return pyarrow.Array.from_buffers(pyarrow.string(), 3, cells.buffers())


BAD = {
    "a.jsonl": (
        b'{"text": "ok"}\n\n{"text": }\n{"text": "so"}\n' + b"[" * 100_000 + b"\n",
        r"a\.jsonl:3: not JSON",
        2,
        ":4",
    ),
    "b.ndjson": (
        b'\xef\xbb\xbf{"text": "ok"}\n{"text": null}\n{"text": "so"}',
        r"b\.ndjson:2: expected an object with a string 'text', .*; found {'text': 'NoneType'}",
        1,
        ":3",
    ),
    "c.txt": (b"one\nna\xefve\n", r"c\.txt:2: byte 0xef is not UTF-8", 1, None),
    "d.parquet": (
        ["ok", None, "so"],
        r"d\.parquet: row 2: expected an object with a string 'text'.*found {'text': 'NoneType'}",
        1,
        ": row 3",
    ),
    "e.parquet": (
        not_utf8_column,
        r"e\.parquet: row 2: byte 0xef is not UTF-8",
        1,
        ": row 3",
    ),
    "f.parquet": (
        [None] * 3,
        r"f\.parquet: row 1: expected an object with a string 'text'.*found {'text': 'NoneType'}",
        3,
        None,
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records_stop_at_the_scan_or_are_skipped_and_counted(tmp_path, name, caplog):
    content, message, count, place = BAD[name]
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        column = content() if callable(content) else content
        write_parquet(tmp_path / name, {"text": column}, row_group_size=2)
    (tmp_path / "z.txt").write_text("end")
    with pytest.raises(UserError, match=message) as error:
        build_source("files", str(tmp_path))
    assert "mend it, or leave such records out with --training.bad_records skip" in str(error.value)
    source = build_source("files", str(tmp_path), bad_records="skip")
    # Each keeps its number, as it has once it is mended.
    found = ["ok", "", "so"] if place else [""]
    texts = [*found, *[""] * (count - 1), "end"]
    assert [d.text for d in read(source)] == texts
    assert source.sizes().tolist() == [len(text) or -1 for text in texts]
    if place is not None:
        assert source.where(2) == f"{tmp_path / name}{place}"
    warnings = [x.getMessage() for x in caplog.records if x.levelname == "WARNING"]
    assert len(warnings) == 1
    assert re.search(rf"{count} bad record\(s\) skipped, the first .*{message}", warnings[0])


def test_a_text_that_is_skipped_has_as_many_numbers_as_its_conversion(tmp_path):
    """By iconv from Latin-1, where lines are cut and at their ends."""
    text = "é" * 150_000 + "\n" + "naïve\n" * 30_000
    (tmp_path / "a.txt").write_bytes(text.encode("latin-1"))
    skipped = build_source(
        "files", str(write_jsonl(tmp_path / "b.jsonl").parent), bad_records="skip"
    )
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    mended = build_source("files", str(tmp_path))
    assert len(skipped) == len(mended) and (skipped.sizes() == -1).sum() == len(mended) - len(
        RECORDS
    )
    assert "".join(d.text for d in read(mended)[: -len(RECORDS)]) == text


def test_columns_that_hold_no_text(tmp_path):
    import pyarrow

    path = tmp_path / "a.parquet"
    for column in ([1, 2], [["x"]], [b"x"]):
        write_parquet(path, {"text": column})
        assert_fails(r"a\.parquet: expected one column of strings 'text'", "files", str(path))
    for column in (
        pyarrow.array(["x", "y", "x"]).dictionary_encode(),
        pyarrow.array(["x", "y", "x"], pyarrow.large_string()),
        pyarrow.array(["x", "y", "x"], pyarrow.string_view()),
    ):
        write_parquet(path, {"text": column})
        assert [d.text for d in read(build_source("files", str(path)))] == ["x", "y", "x"]
