"""What has to be the same on all ranks, and is not by itself: every rank reads its own files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.config.setting import options
from torchtitan_mtp.distributed.ranks import Ranks
from torchtitan_mtp.errors import UserError


def agree(values: Mapping[str, Any]) -> None:
    """See that all ranks have the same values; all call it together, and send but a hash.

    Raises:
        UserError: on every rank: the first key that differs, with each value and its ranks.
    """
    shown = {key: json.dumps(value, default=str) for key, value in values.items()}
    digest = hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()
    if len(set(Ranks().gather(digest))) == 1:
        return
    everyone = Ranks().gather(shown)
    for key in dict.fromkeys(key for rank in everyone for key in rank):
        ranks: dict[str, list[str]] = {}
        for rank, found in enumerate(everyone):
            ranks.setdefault(found.get(key, "nothing"), []).append(str(rank))
        if len(ranks) > 1:
            told = ", ".join(
                f"{value} on rank {', '.join(who[:4])}{', ...' if len(who) > 4 else ''}"
                for value, who in ranks.items()
            )
            raise UserError(f"{key} differs between ranks: {told}; give all of them the same")


def shared_settings(config: JobConfig) -> dict[str, Any]:
    """Keys and values that all ranks have in common. Where a rank finds its input may differ: what
    it finds there is compared."""
    own = {"model.hf_assets_path", "training.dataset_path", "validation.dataset_path"}
    own |= {"training.mixture"}
    own |= {f"job.{key}" for key in ("config_file", "description", "print_config", "debug")}
    keys = options(JobConfig)
    return {k: o.get(config) for k, o in keys.items() if not o.is_table and k not in own}
