"""Which files of a folder are data."""

import fnmatch
import functools
import glob
import itertools
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Set
from pathlib import Path

from torchtitan_mtp.data.compressed import uncompressed_name
from torchtitan_mtp.errors import UserError, looked_in

# What is read of a folder. A file that is named itself, or by a glob, may have any suffix: it is
# text if it has none of RECORDS or .parquet.
RECORDS = (".jsonl", ".ndjson", ".json")
FOLDER_SUFFIXES = tuple(
    """.jsonl .ndjson .jsonl.gz .ndjson.gz .json.gz .jsonl.zst .ndjson.zst .json.zst .parquet
    .txt .text .txt.gz .txt.zst .md .rst .tex .html .xml .css .toml .yaml .yml .sql .sh
    .py .pyi .c .h .cc .cpp .hpp .cu .java .js .ts .go .rs .rb""".split()  # noqa: SIM905
)
_CONFIG = "config.toml"  # a run writes it, with all keys in it
_ABOUT = re.compile(
    r"((?i:readme|licen[cs]e)|COPYING|NOTICE|CHANGELOG|CONTRIBUTING|CITATION)"
    r"([-_.].*)?\.(md|rst|txt|text|html)"
)
# The Hugging Face hub's convention (datasets.data_files.SPLIT_KEYWORDS): a word of these between
# separators in the name of a folder, or else of the file.
_SPLITS = re.compile(
    r"(?:^|(?<=[-._ 0-9/]))"
    r"(?:(?P<train>train|training)|(?P<validation>validation|valid|dev|val)"
    r"|(?P<test>test|testing|eval|evaluation))(?=[-._ 0-9/])"
)
_RECORDS, _TEXTS = (*RECORDS, ".parquet", ".arrow"), (".txt", ".text")

LeftOut = dict[str, list[Path]]  # why -> files and folders


def find_files(
    pattern: str, split: str, outputs: Set[str], key: str
) -> tuple[Path, list[Path], str]:
    """The data at a file, folder or glob.

    Args:
        split: of a folder. "train": no file of another split. "validation": only the validation
            (else test) split of a folder that names one. "all": all.
        outputs: real paths of what this run writes.
        key: what gave the pattern, for messages.

    Returns:
        The folder that names are relative to, the files, sorted, and what is left out, as text.

    Raises:
        UserError: no file, or only outputs or files of other splits.
        OSError: a folder that can't be read.
    """
    place = Path(pattern).expanduser()
    if place.is_file():
        return place.parent, [place], ""
    left_out: LeftOut = defaultdict(list)
    if place.is_dir():
        files = _in_folder(place, split, outputs, left_out)
        if not files:
            raise UserError(
                f"data {place}: no text, .jsonl or .parquet file, no saved dataset below it; name"
                f" files of other kinds by a glob, {place}/**/*.SUFFIX"
            )
    else:
        files = _matching(place, outputs, left_out)
        if not files:
            found = "only outputs of runs" if left_out else "no file, folder or glob match"
            raise UserError(f"data: {found} at {key} {pattern!r}{looked_in(place)}")
        place = Path(os.path.commonpath([path.parent for path in files]))
    files = _each_once(place, files, left_out)
    parts = [f"{len(x)} {why} ({x[0]}{', ...' * (len(x) > 1)})" for why, x in left_out.items() if x]
    return place, files, ("; left out: " + ", ".join(parts)) if parts else ""


def _in_folder(root: Path, split: str, outputs: Set[str], left_out: LeftOut) -> list[Path]:
    def wanted(path: Path) -> bool:
        hidden = path.name.startswith(".")
        why = "hidden" if hidden else "outputs of runs" * is_output(path, outputs)
        if why:
            left_out[why].append(path)
        return not why

    found = list(itertools.chain.from_iterable(inside for _, inside in _walk(root, wanted)))
    saved = {file for path in found if path.name == "state.json" for file in _saved_files(path)}
    files = list(saved)
    for path in sorted({*found} - saved):
        if not path.name.lower().endswith(FOLDER_SUFFIXES):
            left_out["of other kinds"].append(path)
        elif path.is_file() or path.is_symlink():  # a dangling link fails when it is opened
            files.append(path)
    if others := [path for path in files if not _ABOUT.fullmatch(path.name)]:
        left_out["about the data"], files = sorted({*files} - {*others}), others
    for kinds in ((*_RECORDS, *_TEXTS), _RECORDS):
        splits = [_split_of(path.relative_to(root), kinds) for path in files]
        if "train" in splits:  # else texts may well be about tests
            break
    named = {*splits} & {"validation"} or {*splits} & {"test"}
    if named and split != "all":
        keep = named if split == "validation" else {"train", None}
        kept = [path for path, of in zip(files, splits, strict=True) if of in keep]
        left_out["of other splits"] = sorted({*files} - {*kept})
        if not kept:
            raise UserError(
                f"data {root}: all {len(files)} files are of validation or test splits, {files[0]}"
                f" ...; if they are to be trained on, name them by a glob, {root}/**/*"
            )
        files = kept
    return sorted(files)


def _saved_files(state: Path) -> list[Path]:
    """The files of a folder that `datasets` has saved, of which its state.json tells."""
    try:
        return [state.parent / x["filename"] for x in json.loads(state.read_bytes())["_data_files"]]
    except (ValueError, KeyError, TypeError):
        return []  # another program's


def _matching(pattern: Path, outputs: Set[str], left_out: LeftOut) -> list[Path]:
    """The files that a glob matches, sorted, but what runs have written below its fixed part."""
    top = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    is_written = functools.cache(lambda path: is_output(path, outputs))
    files: list[Path] = []
    for path in sorted(_glob(pattern)):
        if path.is_file():
            inside = [path, *itertools.takewhile(lambda folder: folder != top, path.parents)]
            (left_out["outputs of runs"] if any(map(is_written, inside)) else files).append(path)
    return files


def is_output(path: Path, outputs: Set[str]) -> bool:
    """Whether a run wrote it: a folder or file of `outputs` (real paths), or one that is, or holds,
    a config.toml with a dump_folder."""
    config = path if path.name == _CONFIG else path / _CONFIG
    try:
        found = b"dump_folder" in config.read_bytes()
    except OSError:
        found = False
    return found or os.path.realpath(path) in outputs


def _glob(pattern: Path) -> set[Path]:
    """What glob.glob(recursive=True) finds, but "**" takes each folder once, as `_walk` does, and a
    folder that can't be read is an OSError."""
    found = {Path()}
    for part in (*pattern.parts, "*") if pattern.name == "**" else pattern.parts:
        folders = [path for path in found if path.is_dir()]
        if part == "**":
            walks = [_walk(top, lambda path: not path.name.startswith(".")) for top in folders]
            found = {folder for folder, _ in itertools.chain(*walks)}
        elif glob.has_magic(part):
            entries = {
                top / name for top in folders for name in fnmatch.filter(os.listdir(top), part)
            }
            found = {x for x in entries if part[0] == "." or not x.name.startswith(".")}
        else:
            found = {top / part for top in folders if (top / part).exists()}
    return found


def _walk(root: Path, keep: Callable[[Path], bool]) -> Iterator[tuple[Path, list[Path]]]:
    """The folder, those below it and those that links lead to, each once, and the files in it. An
    OSError where one can't be read."""

    def refuse(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    waiting = [root]  # then links: of a folder's two names its own is taken
    for top in waiting:
        for folder, subfolders, names in os.walk(top, onerror=refuse):
            real, entries, files = os.path.realpath(folder), sorted([*subfolders, *names]), []
            subfolders.clear()
            if real in seen:
                continue
            seen.add(real)
            for path in filter(keep, (Path(folder, name) for name in entries)):
                if not path.is_dir():
                    files.append(path)
                elif not path.is_symlink():
                    subfolders.append(path.name)
                elif not Path(real).is_relative_to(path.resolve()):  # else it leads back up
                    waiting.append(path)
            yield Path(folder), files


def _each_once(root: Path, files: list[Path], left_out: LeftOut) -> list[Path]:
    """Each file under one name, its own if that is there, whatever links lead to it."""
    real, top = {x: os.path.realpath(x) for x in files}, os.path.realpath(root)
    once: dict[str, Path] = {}
    for path in sorted(files, key=lambda x: (real[x] != f"{top / x.relative_to(root)}", x)):
        if once.setdefault(real[path], path) is not path:
            left_out["under another name"].append(path)
    return sorted(once.values())


def _split_of(path: Path, kinds: tuple[str, ...]) -> str | None:
    """The split that a file of those suffixes is of, by its folders' names or else its own."""
    if uncompressed_name(path).endswith(kinds):
        for text in (f"{path.parent}/", path.name):
            if found := [*_SPLITS.finditer(text)]:
                return found[-1].lastgroup
    return None
