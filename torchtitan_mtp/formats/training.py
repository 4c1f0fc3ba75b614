"""Hugging Face's folders at the two ends of a run: what it starts from, and what it leaves."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from torchtitan_mtp.build import differing_sizes, write_spec_to_config
from torchtitan_mtp.checkpoint.folders import back_up
from torchtitan_mtp.checkpoint.load import (
    LoadReport,
    compare_names,
    excluded,
    log_report,
    names_of,
)
from torchtitan_mtp.checkpoint.record import check_record, record_of, record_of_model
from torchtitan_mtp.checkpoint.state import cast_weights, model_state
from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.distributed.ranks import Ranks
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats.configs import Unsupported
from torchtitan_mtp.formats.exporting import UNCAPPED, export_checkpoint, formats_for, refusal
from torchtitan_mtp.formats.formats import FORMATS
from torchtitan_mtp.formats.hf_trunk import TrunkFolder
from torchtitan_mtp.formats.importing import format_of, inward, open_model
from torchtitan_mtp.formats.native_modules import (
    CONTRACTS,
    Contract,
    contract_of,
    heads_in,
    misfit,
)
from torchtitan_mtp.formats.read import hf_tensors
from torchtitan_mtp.formats.same import SAME, refusal_of_same
from torchtitan_mtp.models.args import ModelSpec
from torchtitan_mtp.models.hf import HFTrunk
from torchtitan_mtp.models.hf_config import read_config
from torchtitan_mtp.models.init import copy_full_tensor
from torchtitan_mtp.models.trunk import Trunk

logger = logging.getLogger(__name__)


def load_hf_weights(
    path: Path, model: Trunk, ranks: Ranks, exclude: Sequence[str] = ()
) -> LoadReport:
    """Load a folder in one of the HF formats into a materialised (also sharded) model, in place.

    Every rank reads all tensors, one at a time, and keeps its shards. Heads may be missing (they
    keep their init) or too many (they are dropped).

    Raises:
        UserError: on every rank: a damaged folder, another architecture, or another shape.
    """
    load = _load_own if isinstance(model, HFTrunk) else _load
    return ranks.on_all(lambda: load(path, model, exclude))


def config_of_hf(path: Path) -> JobConfig:
    """The configuration of a run of the model in an HF folder, with the folder's tokenizer: in
    this project's code where a format knows it, else in transformers' own; with the heads that the
    folder has modules of.

    Raises:
        UserError: no readable config.json, or a model that neither knows.
    """
    config = JobConfig()
    config.model.hf_assets_path = str(path)
    try:
        spec = open_model(format_of(path), path)[0]
    except Unsupported as unknown:
        try:
            theirs = read_config(str(path))
        except UserError:
            raise unknown from None
        logger.info("%s; transformers' own code runs it", unknown)
        longest = getattr(theirs, "max_position_embeddings", 2048)
        config.model.name = "hf"
        config.training.seq_len = config.validation.seq_len = longest
        kind = next(iter(theirs.architectures or []), "")
        names = hf_tensors(path).kinds if kind in CONTRACTS else ()
        if names and (heads := heads_in(kind, theirs.num_hidden_layers, names)):
            config.model.converters, config.mtp = ["mtp"], heads
    else:
        write_spec_to_config(config, spec)
    return config


def _load(path: Path, model: Trunk, exclude: Sequence[str]) -> LoadReport:
    name = format_of(path)
    spec, tensors = open_model(name, path)
    if different := differing_sizes(model.args, spec.args):
        raise UserError(f"{path}: the run's model has {'; '.join(different)} as config.json says")
    tied = {"output.weight"} if model.args.tied_embeddings else set()
    wanted = {key for key in names_of(model) if not excluded(key, exclude)} - tied
    found = inward(tensors, FORMATS[name], spec, next(model.parameters()).dtype)
    offered = {key for key in found.kinds if not excluded(key, exclude)}
    if any(key.startswith("mtp.") for key in wanted & offered):
        check_record(path, record_of(spec), record_of_model(model), exclude)
    report = compare_names(path, wanted, offered, other_heads=True, aliases={})
    own = model_state(model)
    for key in wanted & offered & own.keys():
        copy_full_tensor(own[key], found.read(key).to(own[key].device))
    log_report(path, report)
    return report


def _load_own(path: Path, model: Any, exclude: Sequence[str]) -> LoadReport:
    """`_load` for a trunk that is transformers' own."""
    told, ours = read_config(str(path)).to_diff_dict(), model.spec.hf_config
    record = record_of(ModelSpec(model.args, hf_config=told))
    check_record(path, record, record_of(ModelSpec(model.args, hf_config=ours)), exclude)
    wanted = {key: t for key, t in model_state(model).items() if not excluded(key, exclude)}
    heads = model.spec.heads == "sequential" and any(key.startswith("mtp.") for key in wanted)
    contract = contract_of(model.spec) if heads else None
    folder = TrunkFolder(path, model, contract)
    if contract is not None and not folder.modules:
        _warn_of_lost_modules(path, model, contract)
    if folder.modules and (why := misfit(replace(model.spec, num_future_tokens=2))):
        raise UserError(f"{path}: {why}; set it so, or exclude mtp from loading")
    if model.args.tied_embeddings:
        wanted.pop(f"{model.output_name}.weight", None)
    known = [name for name in folder.rest if folder.ignored(name) or excluded(name, exclude)]
    offered = {*folder.rest}.difference(known)
    for name, value in folder.read():
        if name not in wanted:
            continue
        target = wanted[name]
        if value.shape != target.shape:
            folder.check_parts(name)
            shapes = f"{tuple(value.shape)}, expected {tuple(target.shape)}"
            where = f"{path}: {folder.on_disk(name)}"
            raise UserError(f"{where} has the shape {shapes}, as config.json says")
        value = cast_weights(value, target.dtype, f"{path}: {name}")
        copy_full_tensor(target, value.to(target.device))
        offered.add(name)
    report = compare_names(path, wanted, offered, other_heads=True, aliases={})
    report = LoadReport(report.missing, (*folder.rest, *folder.copies))
    log_report(path, report)
    return report


def _warn_of_lost_modules(path: Path, model: HFTrunk, contract: Contract) -> None:
    """Fine-tuning elsewhere often drops a folder's modules, and leaves their number in its
    config.json."""
    if told := getattr(model.causal.config.get_text_config(), contract.count, 0):
        lost = f"{path}: config.json says {contract.count} = {told}, and the folder has no module"
        logger.warning("%s; the heads start anew, as mtp.init says", lost)


def hf_format(spec: ModelSpec, origin: str = "", softcap: float | None = None) -> str:
    """The HF format for a model, the first in the order of `FORMATS`; of a trunk of transformers
    `SAME`, of the folder `origin`. Error: there is none, or none for a cap of its logits."""
    if spec.hf_config is not None:
        if why := refusal_of_same(spec, origin):
            raise UserError(f"checkpoint.last_save_in_hf = true: {why}; unset it")
        return SAME
    if softcap is not None:
        told = UNCAPPED.format(softcap)
        raise UserError(f"checkpoint.last_save_in_hf = true: {told}; unset one of them")
    for name in formats_for(spec):
        if name.endswith("_hf"):  # `medusa` is a folder of heads alone
            return name
    nearest = "mimo_hf" if spec.trunk_state == "raw" else "glm4_moe_hf"  # which takes any trunk
    nearest = "deepseek_v3_hf" if spec.block_type == "deepseek_v3" else nearest
    raise UserError(
        "checkpoint.last_save_in_hf = true: no Hugging Face format holds this model; unset it "
        f"({nearest}: {refusal(FORMATS[nearest], spec)})"
    )


def save_in_hf(step: Path, model: Trunk, dtype: torch.dtype | None) -> Path:
    """Export a finished step-N beside itself, as step-N.hf, in the format that holds its heads; in
    the step's own dtype where `dtype` can't hold it: the end of a training must not be lost."""
    name = hf_format(model.spec)
    dtype = None if name == SAME else dtype
    out = step.with_name(f"{step.name}.hf")
    if out.exists():
        back_up(out, "before")
    try:
        export_checkpoint(step, out, name, dtype=dtype)
    except UserError as error:
        if dtype is None:
            raise
        logger.warning("checkpoint.export_dtype: %s; %s is as the step is", error, out.name)
        export_checkpoint(step, out, name)
    logger.info("saved %s (%s)", out, name)
    return out
