import contextlib
import glob
import json
import os
from pathlib import Path

import pytest

from torchtitan_mtp.checkpoint import lock
from torchtitan_mtp.config import JobConfig, to_toml
from torchtitan_mtp.data import folders
from torchtitan_mtp.data.files import fingerprint_files
from torchtitan_mtp.data.mixture import source_from_config
from torchtitan_mtp.data.sources import build_source
from torchtitan_mtp.errors import UserError


def fill(root, names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.table({"text": [name]}), path)
        else:
            path.write_text(json.dumps({"text": name}) + "\n" if ".json" in name else name)
    return root


def names_read(source):
    return [source[i].text for i in range(len(source))]


def read(path, **kwargs):
    return names_read(build_source("files", str(path), **kwargs))


SPLITS = {
    "files": ["train.jsonl", "test.jsonl", "validation.jsonl"],
    "numbered": ["train_0.jsonl", "train_1.jsonl", "dev-0.jsonl", "eval.0.jsonl", "test 3.jsonl"],
    "c4": ["en/c4-train.00000.jsonl", "en/c4-validation.00000.jsonl"],
    "folders": ["train/0.parquet", "val/0.parquet", "testing/a/0.parquet", "x_valid_2/1.parquet"],
    "folder before file": ["train/test_0.jsonl", "test/train_0.jsonl"],
    "shards": ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"],
    "none": ["testimony.jsonl", "latest.jsonl", "developer.parquet", "a/contest.jsonl"],
}


@pytest.mark.parametrize("case", SPLITS)
def test_splits_are_those_of_the_hubs_convention(tmp_path, case):
    data_files = pytest.importorskip("datasets.data_files")
    root = fill(tmp_path / "root", [*SPLITS[case], "README.md"])
    expected = {}
    for split, patterns in data_files.get_data_patterns(str(root)).items():
        for pattern in patterns:
            with contextlib.suppress(FileNotFoundError):  # it says so where nothing matches
                paths = data_files.resolve_pattern(pattern, str(root))
                expected.setdefault(split, []).extend(os.path.relpath(p, root) for p in paths)
    assert read(root) == sorted(set(expected["train"]))
    held_out = expected.get("validation") or expected.get("test") or expected["train"]
    assert read(root, split="validation") == sorted(set(held_out))
    assert read(root, split="all") == sorted(SPLITS[case])


LEFT_OUT = [  # name, and whether it is read
    ("a.txt", True),
    ("src/test_x.py", True),
    ("test/y.py", True),
    ("src/license.py", True),
    ("src/notice.txt", True),
    ("._a.txt", False),
    (".git/x.py", False),
    ("b/.ipynb_checkpoints/a.py", False),
    ("README.md", False),
    ("src/README_de.md", False),
    ("LICENSE-MIT.txt", False),
    ("ptb.train.txt", True),
    ("ptb.test.txt", False),
    ("dev/z.jsonl.gz", False),
    ("image.png", False),
    ("old/config.toml", False),
    ("old/checkpoint/step-2.hf/merges.txt", False),
]


def test_what_is_left_out_of_a_folder_and_told(tmp_path, caplog):
    caplog.set_level("INFO")
    root = fill(tmp_path / "root", [name for name, _ in LEFT_OUT])
    (root / "old" / "config.toml").write_text(to_toml(JobConfig()))
    wanted = sorted(name for name, is_read in LEFT_OUT if is_read)
    found = read(root)
    assert sorted(found) == wanted
    told = caplog.records[-1].getMessage()
    total = sum(map(len, wanted))
    assert f"dataset files: {len(wanted)} file(s), {len(wanted)} documents, {total} bytes" in told
    assert "; left out: 3 hidden (" in told
    assert f"1 outputs of runs ({root}/old)" in told
    assert f"1 of other kinds ({root}/image.png)" in told
    assert "3 about the data (" in told
    assert "2 of other splits (" in told


def test_texts_have_splits_where_one_is_named_for_training(tmp_path):
    names = ["dev-ops.txt", "test.txt", "train.py"]  # code has none
    assert read(fill(tmp_path, names)) == names
    assert read(fill(tmp_path, ["a/train.txt"])) == ["a/train.txt", "train.py"]


def test_a_folder_of_readmes_alone_is_read(tmp_path):
    names = ["a/README.md", "b/LICENSE.txt"]
    assert read(fill(tmp_path, names)) == names


def test_a_folder_of_test_splits_alone_is_refused(tmp_path):
    fill(tmp_path, ["test-0.jsonl", "test-1.jsonl"])
    message = r"all 2 files are of validation or test splits, .*test-0\.jsonl .* by a glob"
    with pytest.raises(UserError, match=message):
        read(tmp_path)
    assert read(tmp_path / "*.jsonl") == ["test-0.jsonl", "test-1.jsonl"]


def test_links_are_followed_and_each_folder_read_once(tmp_path):
    root = fill(tmp_path / "root", ["z/a.txt"])
    fill(tmp_path / "other", ["deep/b.txt", "c.txt"])
    (root / "a_link").symlink_to(root / "z")  # the folder itself is read, under its own name
    (root / "elsewhere").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "deep" / "up").symlink_to(root)
    (root / "z" / "loop").symlink_to(root)
    (root / "out").symlink_to("/")  # leads to where it comes from
    source = build_source("files", str(root))
    assert names_read(source) == ["c.txt", "deep/b.txt", "z/a.txt"]
    assert [source.where(i) for i in range(3)] == [
        f"{root}/elsewhere/c.txt:1",
        f"{root}/elsewhere/deep/b.txt:1",
        f"{root}/z/a.txt:1",
    ]


CIRCLES = {  # link -> what it leads to
    "one up": {"s/up": ".."},
    "two up": {"s/up1": "..", "s/up2": "..", "s/t/up3": "../.."},
    "across": {"s/to": "../z", "z/fro": "../s", "0": "s/t"},
    "a file's other names": {"alias.jsonl": "a.jsonl", "s/0.jsonl": "t/b.jsonl"},
}


@pytest.mark.parametrize("links", CIRCLES.values(), ids=CIRCLES)
@pytest.mark.parametrize("pattern", ["", "**", "**/*", "**/*.jsonl", "**/**/*", "*/../**/*.jsonl"])
def test_a_file_is_read_once_however_many_links_lead_to_it(tmp_path, caplog, links, pattern):
    caplog.set_level("INFO")
    names = ["a.jsonl", "s/t/b.jsonl", "z/c.jsonl"]
    source = build_source("files", str(fill(tmp_path / "without", names) / pattern))
    root = fill(tmp_path / "with", names)
    for link, target in links.items():
        (root / link).symlink_to(target)
    linked = build_source("files", str(root / pattern))
    assert sorted(names_read(linked)) == names
    if ".." not in pattern:
        assert linked.fingerprint == source.fingerprint
    if "alias.jsonl" in links:
        assert " under another name (" in caplog.records[-1].getMessage()


GLOBBED = [
    "a.txt",
    "b/a.txt",
    "b/.h/a.txt",
    ".h/b/a.txt",
    "b/.a.txt",
    "[b]/c/d.txt",
    "b/c/**/e.txt",
]


@pytest.mark.parametrize(
    "pattern",
    """** **/* **/*.txt b/** b/**/a.txt **/b/**/*.txt .h/**/*.txt **/.h/* **/.*/** */** */*/*.txt
    **/[[]b]/** [[]*/**/*.txt **/c/*/*.txt **/**/e.txt **.txt **/a* b/../**/d.txt""".split(),  # noqa: SIM905
)
def test_two_stars_are_those_of_glob(tmp_path, pattern, monkeypatch):
    monkeypatch.chdir(fill(tmp_path, GLOBBED))
    expected = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    source = build_source("files", pattern)
    found = [source.where(i).removesuffix(":1") for i in range(len(source))]
    assert found == [str(path) for path in sorted({*map(Path, expected)})]


def test_a_link_to_nothing_is_an_error(tmp_path):
    (tmp_path / "gone.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"gone\.txt: can't be read: No such file"):
        read(tmp_path)


@pytest.mark.parametrize("pattern", ["", "**", "**/*", "**/*.txt", "*/*.txt", "*/[b]*", "locked/*"])
@pytest.mark.parametrize("calls", [("scandir", "listdir"), ("stat",)], ids=["list", "look"])
def test_what_cannot_be_read_is_an_error(tmp_path, monkeypatch, pattern, calls):
    """A folder that can't be listed, and one whose files can't be looked at."""
    fill(tmp_path, ["a.txt", "c/b.txt", "locked/b.txt"])
    assert read(tmp_path / pattern)
    locked = str(tmp_path / "locked") + ("/b.txt" if calls == ("stat",) else "")

    def refusing(call):
        def act(path, *args, **kwargs):
            if str(path) == locked:
                raise PermissionError(13, "Permission denied", locked)
            return call(path, *args, **kwargs)

        return act

    for call in calls:
        monkeypatch.setattr(os, call, refusing(getattr(os, call)))
    with pytest.raises(UserError, match=f"^data {locked}: can't be read: Permission denied$"):
        read(tmp_path / pattern)


@pytest.mark.parametrize("dump", ["outputs", "", "deep/er"])
@pytest.mark.parametrize("pattern", ["", "**/*"])
@pytest.mark.parametrize("saved", ["checkpoint", "../saved", "../../saved"])
def test_what_the_run_writes_is_no_data_at_its_second_start(tmp_path, dump, pattern, saved):
    root = fill(tmp_path / "root", ["a.txt", "deep/b.md"])
    config = JobConfig()
    config.job.dump_folder = str(root / dump)
    config.checkpoint.folder = saved
    config.training.dataset_path = str(root / pattern)
    config.validation.dataset_path = str(root / pattern)
    first = source_from_config(config, config.training)
    names = [lock.NAME, f"{saved}/step-1/x.md", f"{saved}/step-2.hf/merges.txt"]
    fill(root / dump, [*names, "tb/a/wandb/config.yaml", "profile_traces/i/x.txt"])
    if dump != "outputs":  # a run that has just begun has no config.toml
        (root / dump / "config.toml").write_text(to_toml(config))
    for table in (config.training, config.validation):
        second = source_from_config(config, table)
        assert names_read(second) == ["a.txt", "deep/b.md"]
        assert second.fingerprint == first.fingerprint


def test_only_outputs(tmp_path):
    fill(tmp_path, ["run/a.txt"])
    (tmp_path / "run" / "config.toml").write_text(to_toml(JobConfig()))
    with pytest.raises(UserError, match=r"only outputs of runs at .*txt"):
        read(tmp_path / "**" / "*.txt")
    assert read(tmp_path / "run" / "*.txt") == ["run/a.txt"]  # named, not matched
    assert folders.is_output(tmp_path / "run", set())


def test_a_glob_gives_the_list_of_a_run_that_read_all_of_the_folder(tmp_path):
    names = ["README.md", "a/b.txt", "a/train.txt", "a/test-0.jsonl"]
    paths = sorted(fill(tmp_path, names) / name for name in names)
    found = build_source("files", str(tmp_path / "**" / "*.*")).fingerprint
    assert found == fingerprint_files(tmp_path, paths) + ":text"
