"""Where checkpoints lie: `step-N` folders that are whole or absent, never in between.

A checkpoint is written as `step-N.tmp`, finished (manifest last), flushed to disk and renamed, so
that a death at any moment leaves either no `step-N` or a whole one. Nothing ever writes into an
existing `step-N`.

An object store can't rename a folder, but has a file whole or not at all. There `step-N` is written
in place, DCP's `.metadata` after the shards and the manifest last, and counts once it has
`.metadata`, which a removal takes away first.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import shutil
import tempfile
from operator import attrgetter
from pathlib import Path

from torchtitan_mtp.checkpoint.manifest import (
    FULL,
    MODEL_ONLY,
    Manifest,
    read_manifest,
    write_manifest,
)
from torchtitan_mtp.checkpoint.manifest import NAME as MANIFEST
from torchtitan_mtp.checkpoint.metadata import read_metadata
from torchtitan_mtp.checkpoint.remote import RemotePath, as_path
from torchtitan_mtp.config import load_toml
from torchtitan_mtp.errors import UserError, hub_hint, looked_in
from torchtitan_mtp.writing import sync

logger = logging.getLogger(__name__)

_STEP = re.compile(r"^step-(\d+)$")
_REMOVING = ".removing"
_FREE_SPACE_MARGIN = 1.02  # file headers and metadata beside the tensors


def checkpoint_folder(dump_folder: str | os.PathLike[str], folder: str) -> Path:
    """Where a run's checkpoints lie: below its dump folder, or at a URL of their own."""
    return as_path(folder) if "://" in folder else as_path(dump_folder) / folder


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step}"


def tmp_folder(folder: Path, step: int) -> Path:
    """Where step-N is written: beside it, or in place where there is no rename."""
    return folder / (f"step-{step}" if isinstance(folder, RemotePath) else f"step-{step}.tmp")


def finished_steps(folder: Path) -> list[int]:
    """The steps whose saving was finished, ascending; content is not looked at."""
    if not folder.is_dir():
        return []
    found = ((_STEP.match(entry.name), entry) for entry in folder.iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match, entry in found if match and _finished(entry))


def _finished(path: Path) -> bool:
    return (path / ".metadata").is_file() or (path / MANIFEST).is_file()


def warn_about_leftovers(folder: Path) -> None:
    """Name the folders of interrupted saves, which are ignored."""
    if not folder.is_dir():
        return
    for entry in sorted(folder.iterdir(), key=attrgetter("name")):
        if entry.name.endswith(".tmp") and _STEP.match(entry.name.removesuffix(".tmp")):
            logger.warning("%s: left by an interrupted save, ignored", entry)
        elif _STEP.match(entry.name) and entry.is_dir() and not _finished(entry):
            logger.warning("%s: neither .metadata nor manifest: not finished, ignored", entry)


def kind_of(path: Path) -> str:
    """FULL or MODEL_ONLY: what the manifest says, or what the metadata holds. Error: a file of the
    checkpoint is missing or has the wrong size."""
    manifest = read_manifest(path)
    if manifest is not None:
        return manifest.kind
    names = read_metadata(path).state_dict_metadata
    return FULL if any(name.startswith("optimizer.") for name in names) else MODEL_ONLY


def whole_kind(path: Path) -> str | None:
    """`kind_of`, or None where the checkpoint is damaged or not there at all."""
    try:
        return kind_of(path)
    except UserError:
        return None


def chosen_step(folder: Path, load_step: int) -> int | None:
    """The step a run of this folder loads: the one asked for, else the newest full one, else a
    seed; None where there is none. Error: the step asked for is not there, or the newest candidate
    is damaged."""
    finished = finished_steps(folder)
    if load_step in finished:
        return load_step
    if load_step != -1:
        raise UserError(
            f"{step_folder(folder, load_step)}: not there (checkpoint.load_step = {load_step}); "
            f"finished steps: {', '.join(map(str, finished)) or 'none'}"
        )
    for step in reversed(finished):  # a damaged one raises, and is never skipped
        if kind_of(step_folder(folder, step)) == FULL:
            return step
    return 0 if 0 in finished else None


def start_writing(folder: Path, step: int, total_bytes: int) -> None:
    """Make the empty folder to write in. Error: it can't be made, or `total_bytes` don't fit."""
    tmp = tmp_folder(folder, step)
    try:
        if isinstance(tmp, RemotePath) and _finished(tmp):
            back_up(tmp)
        elif tmp.exists():
            logger.warning("%s: left by an interrupted save, removed", tmp)
            remove(tmp)
        if isinstance(folder, RemotePath):
            return  # stores make folders by themselves, and have room
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        needed = int(total_bytes * _FREE_SPACE_MARGIN)
        if free < needed:
            raise UserError(
                f"{folder}: step-{step} needs {needed:,} bytes, {free:,} are free; make room, "
                "lower checkpoint.keep_latest_k or set checkpoint.folder to another disk"
            )
        tmp.mkdir()
    except OSError as error:
        raise UserError(f"{tmp}: can't be made: {error}; check job.dump_folder") from error


def finish_writing(folder: Path, manifest: Manifest, after: int | None = None) -> Path:
    """Write the manifest into the folder that was written, flush it and rename it to `step-N`.

    What lies there already is kept (`back_up`), and so are, at a run's first save, all steps after
    the one that it came from (`after`).
    """
    tmp, final = tmp_folder(folder, manifest.step), step_folder(folder, manifest.step)
    write_manifest(tmp, manifest)
    later = [] if after is None else [s for s in finished_steps(folder) if s > after]
    for step in later:
        if step != manifest.step:
            back_up(step_folder(folder, step))
    if not isinstance(folder, RemotePath):
        sync(tmp / MANIFEST)
        sync(tmp)
        if final.exists():
            back_up(final)
        tmp.rename(final)
        sync(folder)
    return final


def back_up(path: Path, kind: str = "") -> None:
    """Rename what is in the place of something new after its kind: step-N.full, step-N.model_only
    or step-N.damaged, with a number where such a name is taken."""
    base = f"{path.name}.{kind or whole_kind(path) or 'damaged'}"
    names = (base if n == 1 else f"{base}.{n}" for n in itertools.count(1))
    backup = next(to for name in names if not (to := path.parents[0] / name).exists())
    path.rename(backup)
    logger.warning("%s: was there already, kept as %s", path, backup.name)


def remove(path: Path) -> None:
    """Remove a folder, which stops to count first, so that dying leaves no half step; and those
    that an earlier death left."""
    if isinstance(path, RemotePath):
        for name in (MANIFEST, ".metadata"):
            (path / name).remove()
        path.remove()
    else:
        for removing in path.parent.glob(f"step-*{_REMOVING}"):
            shutil.rmtree(removing, ignore_errors=True)
        shutil.rmtree(path.rename(path.with_name(f"{path.name}{_REMOVING}")))


def steps_to_remove(kinds: dict[int, str], keep: int, written: int) -> list[int]:
    """The steps beyond the newest `keep` (0: all), sparing the last full one and the one just
    written. kinds: of the whole checkpoints; others neither count nor are removed."""
    steps = sorted(kinds)
    full = [step for step in steps if kinds[step] == FULL]
    spared = {*steps[-keep:], *full[-1:], written}  # the last 0 are all
    return [step for step in steps if step not in spared]


def remove_old(folder: Path, keep: int, written: int) -> None:
    """Apply `checkpoint.keep_latest_k` after `step-{written}` has been finished."""
    found = ((step, whole_kind(step_folder(folder, step))) for step in finished_steps(folder))
    whole = {step: kind for step, kind in found if kind is not None}
    for step in steps_to_remove(whole, keep, written):
        logger.info("removing step-%d (checkpoint.keep_latest_k = %d)", step, keep)
        with contextlib.suppress(OSError):
            remove(step_folder(folder, step))


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The checkpoint that `path` means.

    Args:
        path: a `step-N` folder (or any DCP folder), a folder of `step-N` folders, or a run's dump
            folder, whose config.toml says where they are; each also as a URL that fsspec knows. Of
            several steps the latest finished one is meant, model-only ones included.

    Raises:
        UserError: there is none, or a dump folder holds several folders of checkpoints.
    """
    given = as_path(path)
    if not given.is_dir():
        wanted = "expected a checkpoint or a run's folder"
        where = looked_in(given) if isinstance(given, Path) else ""  # not of a URL
        raise UserError(f"{given}: no such folder; {wanted}{where}{hub_hint(path)}")
    if _finished(given):
        return given
    own = given
    if (config := given / "config.toml").is_file():
        own = checkpoint_folder(given, load_toml(_local(config)).checkpoint.folder)
    for places in ([given], [own], [given / "checkpoint"], given.iterdir()):
        found = [folder for folder in places if finished_steps(folder)]
        if len(found) > 1:
            names = ", ".join(sorted(folder.name for folder in found))
            raise UserError(f"{given}: several folders of checkpoints ({names}); name one of them")
        if found:
            return step_folder(found[0], finished_steps(found[0])[-1])
    raise UserError(f"{given}: no finished checkpoint in it (a step-N folder with .metadata)")


def _local(file: Path) -> Path:
    """The file, or a copy of one in an object store."""
    if not isinstance(file, RemotePath):
        return file
    local = Path(tempfile.mkdtemp()) / file.name
    local.write_text(file.read_text())
    return local


def find_config(path: str | os.PathLike[str]) -> Path:
    """The config.toml of the run that the checkpoint which `path` means comes from.

    A run writes it into its dump folder, its checkpoints some way below that.

    Raises:
        UserError: no checkpoint, or no config.toml near it.
    """
    checkpoint = find_checkpoint(path)
    for folder in (as_path(path), checkpoint, *checkpoint.resolve().parents[:3]):
        if (file := folder / "config.toml").is_file():
            return _local(file)
    raise UserError(
        f"{checkpoint}: no config.toml in this folder or the three above it; it says which model "
        "this is: copy it from the run's job.dump_folder"
    )
