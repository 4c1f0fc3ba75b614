"""Load weights from a DCP folder into a model that need not match it head for head.

The trunk must match exactly, name by name and shape by shape; multi-token-prediction heads may be
missing (they start as mtp.init says) or too many (they are dropped). The report names them.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from torchtitan_mtp.checkpoint import state as states_of
from torchtitan_mtp.checkpoint.checksums import FileEntry
from torchtitan_mtp.checkpoint.folders import find_checkpoint
from torchtitan_mtp.checkpoint.manifest import Manifest, read_manifest
from torchtitan_mtp.checkpoint.metadata import read_metadata
from torchtitan_mtp.checkpoint.record import (
    Record,
    check_record,
    record_beside,
    record_of_model,
    untold,
)
from torchtitan_mtp.checkpoint.storage import SafeLoadPlanner, SafeReader
from torchtitan_mtp.distributed.ranks import Ranks
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.rope import rope_mismatch

logger = logging.getLogger(__name__)

# What lies beside the model in a full checkpoint, here and in TorchTitan's.
OTHER_STATES = {"optimizer", "lr_scheduler", "dataloader", "train_state", "rng"}
# What torch.load adds to its reason: to run what is in the file.
_ADVICE = (
    r"Weights only load failed\.|(This file can still|Please file an).*?WeightsUnpickler error:|"
    r"In PyTorch 2\.6.*?trusted source\.|\. Please use `torch.*|\n\nCheck the documentation.*|"
    r" or \w+ allowlisted via `add_safe_globals`"
)
# The rotary table that old TorchTitan checkpoints hold; it is computed, not learned.
_TABLE = "freqs_cis"


@dataclass(frozen=True)
class LoadReport:
    """What a partial load left out, by parameter name.

    Attributes:
        missing: in the model, not in the checkpoint: they keep what they have.
        unexpected: in the checkpoint, not in the model: dropped.
        cast: floating tensors that were widened to the model's dtype, exactly.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    cast: tuple[str, ...] = ()


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose files are all there, and whose content is compared as it is read.

    `manifest` is None where other tools wrote it; `sums`: the manifest's of its files, empty where
    contents are not compared; `record`: the manifest's, else what the config.toml near it says.
    """

    path: Path
    metadata: Metadata
    manifest: Manifest | None
    sums: dict[str, FileEntry]
    record: Record | None

    @property
    def stored(self) -> dict[str, Any]:
        return self.metadata.state_dict_metadata


def open_checkpoint(path: Path, ranks: Ranks, verify: bool = True) -> Opened:
    """Read a checkpoint's manifest and metadata, and see that all its files are there.

    verify: compare everything that is read, here and later, with the manifest's checksums.
    Error, on every rank: naming the file that is missing, truncated or altered.
    """

    def read() -> Opened:
        manifest = read_manifest(path)
        sums = manifest.files if manifest and verify else {}
        record = (manifest.record if manifest else None) or record_beside(path)
        return Opened(path, read_metadata(path, sums.get(".metadata")), manifest, sums, record)

    opened = ranks.on_all(read)
    if opened.manifest is None and verify:
        logger.warning("%s: no manifest.json, so its content can't be verified", path)
    return opened


def read_states(opened: Opened, states: dict[str, Any], ranks: Ranks) -> None:
    """Read the entries of flat `states` from the checkpoint: tensors in place, objects replaced.
    Error: a file can't be read, or is not what was written; they are then part old, part new."""
    try:
        states_of.quiet()
        dcp.load(
            states,
            storage_reader=SafeReader(opened.path, opened.metadata, opened.sums),
            planner=SafeLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=ranks.group,
            no_dist=not ranks.distributed,
        )
    except CheckpointException as error:
        what = one_line(error)
        if what.startswith(str(opened.path)):  # it names the file itself
            raise UserError(what) from error
        raise UserError(f"{opened.path}: can't be read: {what}") from error


def read_whole(opened: Opened, key: str) -> torch.Tensor:
    """A whole tensor as it is stored, by this rank alone. Errors: as `read_states`."""
    entry = opened.stored[key]
    tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
    read_states(opened, {key: tensor}, Ranks(alone=True))
    return tensor


def first_failure(error: CheckpointException) -> BaseException:
    """The first rank's failure in DCP's collection; one of the user's before the others."""
    failures = [failure for failure, _ in error.failures.values()]
    return next((f for f in failures if isinstance(f, UserError)), failures[0])


def one_line(error: BaseException) -> str:
    """Kind and message, in one line; the message alone of an error that is written for users. What
    torch adds to one, to run what is in the file, is left out."""
    if isinstance(error, CheckpointException):
        error = first_failure(error)
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    message = re.sub(_ADVICE, "", str(error), flags=re.DOTALL).strip()
    return f"{kind}{message}".splitlines()[0]


def excluded(name: str, exclude: Iterable[str]) -> bool:
    """Whether `checkpoint.exclude_from_loading` names this parameter or a parent of it."""
    return any(entry in ("model", name) or name.startswith(f"{entry}.") for entry in exclude)


def names_line(names: Sequence[str]) -> str:
    """The count and the first few names, for one log line."""
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} ({', '.join(names[:3])}{more})"


def stored_model_names(opened: Opened) -> dict[str, str]:
    """Parameter name -> key in the checkpoint, for every model tensor that it holds."""
    keys = [
        key
        for key, entry in opened.stored.items()
        if isinstance(entry, TensorStorageMetadata) and key.split(".")[0] not in OTHER_STATES
    ]
    # TorchTitan before v0.1 nested the model under "model."
    nested = bool(keys) and all(key.startswith("model.") for key in keys)
    return {key.removeprefix("model.") if nested else key: key for key in keys}


def load_model_weights(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    other_heads: bool = True,
    exclude: Sequence[str] = (),
    allow_cast: bool = False,
) -> LoadReport:
    """Load a checkpoint's weights into `model`, in place, from any number of ranks into any other.

    Args:
        path: what `find_checkpoint` understands: a step, a folder of steps, a run.
        model: materialized; sharded (DTensors) where a process group exists, or plain.
        other_heads: heads may be missing (they keep their init) or too many (they are dropped).
        exclude: names, or parents of names, not to load ("model" is all of them).
        allow_cast: round to a narrower dtype where the model has one; widening is always allowed.

    Raises:
        UserError: damaged files; a parameter missing or unexpected beyond what is allowed; a
            head that is there in part; another shape or a dtype that would lose precision; a
            model that computes something else with the same shapes.
    """
    ranks = Ranks()
    opened = open_checkpoint(ranks.on_rank_0(lambda: find_checkpoint(path)), ranks)
    return load_opened_weights(
        opened, model, ranks, exclude, other_heads=other_heads, allow_cast=allow_cast
    )


def load_opened_weights(
    opened: Opened,
    model: nn.Module,
    ranks: Ranks,
    exclude: Sequence[str] = (),
    *,
    other_heads: bool = False,
    allow_cast: bool = False,
    resuming: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> LoadReport:
    """`load_model_weights` of a checkpoint that is open.

    resuming: a run with this optimizer goes on from it: exactly the same dtypes, and the same in
        all that no tensor tells.
    """
    ours = record_of_model(model, optimizer)
    check_record(opened.path, opened.record, ours, exclude, resuming)
    if "model" in exclude:
        return LoadReport()
    stored = stored_model_names(opened)
    table = stored.pop(_TABLE, "")
    if ours is not None:
        _check_program(opened, ours)
        if table and not excluded(_TABLE, exclude):
            ranks.on_all(lambda: _check_table(opened, table, model))
    wanted = {n: t for n, t in states_of.model_state(model).items() if not excluded(n, exclude)}
    offered = {name for name in stored if not excluded(name, exclude)}
    aliases = names_of(model)
    whole = [name for name in aliases if not excluded(name, exclude)]
    report = compare_names(opened.path, whole, offered, other_heads, aliases)
    targets = {name: tensor for name, tensor in wanted.items() if name in offered}
    cast = ranks.on_all(
        lambda: [
            name
            for name, tensor in targets.items()
            if check_entry(opened, stored[name], tensor, allow_cast, resuming)
        ]
    )
    _read_tensors(opened, targets, aliases, stored, ranks)
    checked = {stored[n]: t for n, t in targets.items() if allow_cast or n in cast}
    ranks.on_all(lambda: _check_finite(opened, checked))
    report = replace(report, cast=tuple(cast))
    log_report(opened.path, report)
    return report


def _check_finite(opened: Opened, loaded: dict[str, torch.Tensor]) -> None:
    """Refuse numbers that are not finite (by key in the checkpoint), with what is stored there."""
    for key, tensor in loaded.items():
        if not states_of.is_finite(tensor):
            states_of.cast_weights(read_whole(opened, key), tensor.dtype, f"{opened.path}: {key}")


def _check_table(opened: Opened, key: str, model: Any) -> None:
    """Refuse weights that were trained with other rotary frequencies than the model's."""
    if far := rope_mismatch(read_whole(opened, key), model.args):
        raise UserError(
            f"{opened.path}: {key} differs from the rotary frequencies by up to {far:.3g}, by "
            f"rope_theta = {model.args.rope_theta:g}; set model.args.rope_theta and rope_scaling "
            f"as it was trained, or put {_TABLE} into checkpoint.exclude_from_loading"
        )


def _check_program(opened: Opened, record: Record) -> None:
    """Refuse TorchTitan's Qwen3, whose heads turn other pairs; say what is taken for granted of
    weights that come without a word about their model. record: of the model here."""
    ours = opened.manifest is not None and "format" not in (opened.record or {"format": ""})
    if record["args"]["qk_norm"] and not ours:
        raise UserError(
            f"{opened.path}: not of a run here; TorchTitan's Qwen3 turns other pairs of a head: "
            "read it with torchtitan-mtp-import --format torchtitan"
        )
    if opened.record is None:
        logger.warning(
            "%s: no word of its model, taken for one with %s; set what is not so",
            *(opened.path, untold(record)),
        )


def names_of(model: nn.Module) -> Mapping[str, Collection[str]]:
    """Name -> all names of the same tensor (a tied weight has several), of all that a checkpoint of
    the model holds: of a stage of a pipeline, those of other ranks too."""
    whole = getattr(model, "whole", None)
    return whole or {name: {name} for name in states_of.model_state(model)} | aliases_of(model)


def aliases_of(model: nn.Module) -> dict[str, set[str]]:
    """Name -> all names of the same parameter (a tied weight has several)."""
    names: dict[nn.Parameter, set[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(param, set()).add(states_of.plain_name(name))
    return {name: group for group in names.values() for name in group}


def _unit(name: str) -> str:
    """What is loaded whole or not at all: one head (`mtp.heads.K`), or a parameter."""
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[:2] == ["mtp", "heads"] else name


def compare_names(
    path: Path,
    wanted: Collection[str],
    offered: set[str],
    other_heads: bool,
    aliases: Mapping[str, Collection[str]],
) -> LoadReport:
    """What is missing or unexpected. Error: beyond what is allowed, or a head there in part."""
    missing = tuple(name for name in wanted if offered.isdisjoint(aliases.get(name, {name})))
    unexpected = tuple(sorted(offered.difference(wanted)))
    free = ("mtp.",) if other_heads else ()
    absent = [name for name in missing if not name.startswith(free)]
    extra = [name for name in unexpected if not name.startswith(free)]
    if absent or extra:
        found = f"lacks {names_line(absent)} of the model"
        found = found if absent else f"holds {names_line(extra)}, which the model has not"
        raise UserError(
            f"{path}: {found}; choose the model that it was saved from, or name them in "
            "checkpoint.exclude_from_loading"
        )
    loaded_units = {_unit(name) for name in offered.intersection(wanted)}
    partial = [name for name in (*missing, *unexpected) if _unit(name) in loaded_units]
    if partial:
        raise UserError(
            f"{path}: head {_unit(partial[0])} is of another kind: {names_line(partial)} differ; "
            "set mtp.heads as it was saved, or put mtp into checkpoint.exclude_from_loading"
        )
    return LoadReport(missing, unexpected)


def check_entry(
    opened: Opened,
    key: str,
    expected: torch.Tensor,
    allow_cast: bool = False,
    exact_dtype: bool = False,
) -> bool:
    """Compare one stored tensor with the one it is to fill; return whether it will be cast. Error:
    not a tensor, another shape, or a dtype that is not allowed."""
    entry = opened.stored[key]
    if not isinstance(entry, TensorStorageMetadata):
        raise UserError(f"{opened.path}: {key} is not a tensor, expected {tuple(expected.shape)}")
    if entry.size != expected.shape:
        raise UserError(
            f"{opened.path}: {key} has shape {tuple(entry.size)}, the model expects "
            f"{tuple(expected.shape)}; choose the model that it was saved from"
        )
    found = entry.properties.dtype
    if found == expected.dtype:
        return False
    floating = found.is_floating_point and expected.dtype.is_floating_point
    widening = floating and torch.promote_types(found, expected.dtype) == expected.dtype
    if exact_dtype or not (widening or (allow_cast and floating)):
        raise UserError(
            f"{opened.path}: {key} is {found}, the model expects {expected.dtype}; set "
            "training.dtype as it was saved"
        )
    return True


def _read_tensors(
    opened: Opened,
    targets: dict[str, torch.Tensor],
    aliases: Mapping[str, Collection[str]],
    stored: dict[str, str],
    ranks: Ranks,
) -> None:
    """Fill the targets (by parameter); tied names that differ in the checkpoint are an error."""
    first = {name: min(targets.keys() & aliases[name]) for name in targets}  # it fills the tensor
    states: dict[str, Any] = {
        stored[name]: tensor if first[name] == name else torch.empty_like(tensor)
        for name, tensor in targets.items()
    }
    read_states(opened, states, ranks)
    if all(len(names) == 1 for names in aliases.values()):
        return
    pairs = [(stored[name], stored[n]) for name, n in first.items() if name != n]
    differ = [
        f"{key} and {other}"
        for key, other in pairs
        if not torch.equal(*map(states_of.local_part, (states[key], states[other])))
    ]
    if told := [names for found in ranks.gather(differ) for names in found]:
        raise UserError(
            f"{opened.path}: {told[0]} differ, but the model ties them; choose a model "
            "without tied embeddings"
        )


def log_report(path: Path, report: LoadReport) -> None:
    """One line each for what was loaded, left out and cast."""
    logger.info("loaded weights from %s", path)
    if report.missing:
        logger.info("not in the checkpoint, start as mtp.init says: %s", names_line(report.missing))
    if report.unexpected:
        logger.info("not in the model, dropped: %s", names_line(report.unexpected))
    if report.cast:
        logger.info("cast to the model's dtype: %s", names_line(report.cast))
