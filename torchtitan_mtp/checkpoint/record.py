"""What no tensor of a checkpoint tells: the model's constants, how its heads are joined, and which
optimizer's moments it holds. Every manifest records them."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchtitan_mtp.build import args_to_keys, spec_from_config
from torchtitan_mtp.checkpoint.folders import find_config
from torchtitan_mtp.checkpoint.manifest import read_manifest
from torchtitan_mtp.config import JobConfig, load_toml
from torchtitan_mtp.config.values import show
from torchtitan_mtp.data.tokenizer import Tokenizer, build_tokenizer
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.args import ROPE_SCALINGS, LatentArgs, ModelArgs, ModelSpec, MoEArgs
from torchtitan_mtp.models.flavors import EARLIER_FLAVORS
from torchtitan_mtp.models.trunk import Trunk

logger = logging.getLogger(__name__)

# Of a config.json: what decides nothing that a trunk computes.
_SAID_ELSEWHERE = {"architectures", "dtype", "transformers_version", "use_cache", "model_type"}
_SAID_ELSEWHERE |= {"num_nextn_predict_layers", "mtp_num_hidden_layers"}

# The fields of a ModelSpec, and the optimizer's name; the loss's softcap; of an export the format.
Record = dict[str, Any]

# What the names and shapes of tensors tell of `sizes`; and of `constants`, once the number of heads
# is known.
_SHAPED = {"dim", "n_layers", "hidden_dim", "tied_embeddings", "qk_norm", "qkv_bias"}
_TOLD = re.compile(
    r"optimizer|mtp\.[hns]|model\.args\.(n_kv|latent|moe\.(n_dense|hidden|num_experts|num_shared))"
)


def record_of(spec: ModelSpec, optimizer: str = "") -> Record:
    """As plain data; `spec_of_record` takes the model back. optimizer: its name, "" for none."""
    record = asdict(spec) | {"optimizer": optimizer}
    if (scaling := spec.args.rope_scaling) is not None:
        record["args"]["rope_scaling"]["rope_type"] = scaling.rope_type
    return record


def spec_of_record(record: Record) -> ModelSpec:
    """The model of a record. Error: not a record, or one of a later version."""
    try:
        args: Record = dict(record["args"])
        for name, kind in (("latent", LatentArgs), ("moe", MoEArgs)):
            args[name] = kind(**args[name]) if args[name] else None
        if scaling := dict(args["rope_scaling"] or {}):
            args["rope_scaling"] = ROPE_SCALINGS[scaling.pop("rope_type")](**scaling)
        fields = {k: v for k, v in record.items() if k not in ("optimizer", "softcap", "format")}
        return ModelSpec(**fields | {"args": ModelArgs(**args)})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"not a record of this version: {error}; update this program") from error


def record_of_model(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> Record | None:
    """None for a model of another program."""
    if not isinstance(model, Trunk):
        return None
    name = "" if optimizer is None else type(optimizer).__name__
    return record_of(model.spec, name) | {"softcap": model.softcap}


def record_beside(checkpoint: Path) -> Record | None:
    """By the config.toml near a checkpoint without a record; None where none tells."""
    try:
        config = load_toml(find_config(checkpoint))
        earlier = keeps_earlier(config, checkpoint, say=False)
        spec = spec_from_config(config, config.model.vocab_size or 1, earlier)
        return record_of(spec, config.optimizer.name) | {"softcap": config.loss.softcap}
    except UserError:
        return None


def keeps_earlier(config: JobConfig, checkpoint: Path | None, say: bool = True) -> bool:
    """Whether the model of a run's checkpoint has what its flavor had before its numbers became
    TorchTitan's: one without a record, or whose record says so. Error: a damaged manifest."""
    name, flavor = config.model.name, config.model.flavor
    fields = EARLIER_FLAVORS.get((name, flavor), {})
    manifest = read_manifest(checkpoint) if fields and checkpoint is not None else None
    if manifest is None:
        return False
    now, then = (vars(spec_from_config(config, 1, earlier).args) for earlier in (False, True))
    kept = {key: then[key] for key in fields if now[key] != then[key]}
    theirs = vars(spec_of_record(manifest.record).args) if manifest.record else then
    if not kept or any(theirs[key] != value for key, value in kept.items()):
        return False
    if say:
        told = ", ".join(f"{key} = {value}" for key, value in kept.items())
        older = f"{checkpoint}: from before {name} {flavor} had TorchTitan's numbers; keeps"
        logger.warning("%s %s", older, told)
    return True


def check_tokenizer(checkpoint: Path, path: str, tokenizer: Tokenizer | None = None) -> None:
    """Error: what `path` names (`tokenizer`, where it is built already) is not the tokenizer that
    the checkpoint's manifest tells of: a path may mean another one from elsewhere, or later. What
    was put around texts then is put there again."""
    manifest = read_manifest(checkpoint)
    if not path or manifest is None or manifest.tokenizer is None:
        return
    ours = tokenizer or build_tokenizer(path)
    if not ours.resume_as(manifest.tokenizer):
        place = path if path == "byte" else os.path.abspath(os.path.expanduser(path))
        raise UserError(
            f"{checkpoint}: goes with the tokenizer {manifest.tokenizer}; {place} is another, "
            f"{ours.fingerprint}: set model.hf_assets_path in the run's config.toml to its own"
        )


def constants(record: Record) -> Record:
    """What a record says by keys of the configuration, less what names and shapes of tensors tell.
    Error: as `spec_of_record`."""
    spec = spec_of_record(record)
    args = spec.args
    said = args_to_keys(args)
    said.setdefault("rope_scaling.factor", 1.0)
    found: Record = {f"model.args.{key}": v for key, v in said.items() if key not in _SHAPED}
    found |= {
        "model.args.final_norm_eps": args.final_norm_eps or args.norm_eps,
        "model.attn_mask_type": args.attn_mask_type,
        "mtp.heads": spec.heads,
        "mtp.num_future_tokens": spec.num_future_tokens,
        "optimizer.name": record["optimizer"],
    }
    told = (spec.hf_config or {}).items()
    found |= {f"config.json {key}": value for key, value in told if key not in _SAID_ELSEWHERE}
    if "softcap" in record:
        found["loss.softcap"] = record["softcap"] or "none"
    if spec.heads == "sequential":
        # One module that is applied once is that module, shared or not.
        found["mtp.share_weights"] = spec.share_weights and spec.num_future_tokens > 2
        found["mtp.trunk_state"] = spec.trunk_state
    return found


def untold(record: Record) -> str:
    """What a folder of TorchTitan's does not say of its model, and no shape gives away."""
    said = constants(record).items()
    return ", ".join(f"{key} = {show(x)}" for key, x in said if not _TOLD.match(key))


def check_record(
    source: Path,
    theirs: Record | None,
    ours: Record | None,
    exclude: Collection[str] = (),
    resuming: bool = False,
) -> None:
    """Refuse weights of a model that computes something else with the same tensors. To start from
    weights, other rotary positions (a longer context) and another softcap are only warned of, and
    the mask is free. A key that only one has says nothing.

    Error: naming `source` and all keys that differ, with both values.
    """
    if theirs is None or ours is None:
        return
    try:
        a, b = constants(theirs), constants(ours)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    differing = {key for key in a if key in b and a[key] != b[key]}
    matters = [key for key in a if key in differing and _matters(key, exclude, resuming)]
    if not matters:
        return
    told = ", ".join(f"{key} = {show(a[key])}, this run has {show(b[key])}" for key in matters)
    if not resuming and all(key.startswith(("model.args.rope_", "loss.")) for key in matters):
        logger.warning("%s: trained with %s: adapted from here on", source, told)
        return
    out = sorted({key.partition(".")[0] for key in matters} & {"mtp", "optimizer"})
    raise UserError(
        f"{source}: trained with {told}; set it as it was"
        + (", or start a new run from it (checkpoint.initial_load_path)" if resuming else "")
        + (f", or leave it out with checkpoint.exclude_from_loading = {show(out)}" if out else "")
    )


def _matters(key: str, exclude: Collection[str], resuming: bool) -> bool:
    part = key.partition(".")[0]
    if part == "optimizer":
        return resuming and part not in exclude
    if "model" in exclude or (part == "mtp" and not {"mtp", "mtp.heads"}.isdisjoint(exclude)):
        return False
    # Weights without a resume: the heads that both have are told by their tensors' names.
    return resuming or key == "mtp.trunk_state" or key.startswith(("model.args.", "loss."))
