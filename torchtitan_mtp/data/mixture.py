"""Several sources by weight, and which of them a window comes from."""

import bisect
import itertools
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.config.sections.training import Training, Validation
from torchtitan_mtp.data.hub import StreamSource
from torchtitan_mtp.data.sources import Source, build_source, find_source
from torchtitan_mtp.errors import UserError

logger = logging.getLogger(__name__)

_STEP = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: its multiples spread most evenly


class Mixture:
    """Sources of which each gives a share of the windows.

    Args:
        sources: in an order that a resumed run has to keep.
        shares: one a source, above 0 and 1 in all.
    """

    def __init__(
        self, sources: Sequence[Source | StreamSource], shares: Sequence[float] = (1.0,)
    ) -> None:
        self.sources = list(sources)
        self.shares = list(shares)
        self.name = " + ".join(source.name for source in sources)
        self.fingerprint = " + ".join(source.fingerprint for source in sources)
        self._bounds = [int(x * 2**64) for x in itertools.accumulate(shares)][:-1]

    def pick(self, lane: int, index: int) -> int:
        """The source of a lane's window number `index`.

        Lane and index give a point in [0, 2^64), of which every source has an interval, its share.
        Lanes start at van der Corput's points, so that neighbouring lanes, which make a global
        batch, are spread evenly over the interval; and each window of a lane is one step of the
        golden ratio further, which spreads these.
        """
        start = int(f"{lane:064b}"[::-1], 2)
        return bisect.bisect_right(self._bounds, (start + index * _STEP) % 2**64)


def source_from_config(
    config: JobConfig, table: Training | Validation
) -> Source | StreamSource | Mixture:
    """The documents of config.training or config.validation, without what the run writes.

    Raises:
        UserError: as `build_source`; an entry of the mixture that is none.
    """
    written = ["", "run.lock", config.checkpoint.folder, config.metrics.save_tb_folder]
    written += [config.profiling.save_traces_folder, config.comm.save_traces_folder]
    written += [config.profiling.save_memory_snapshot_folder]
    training = isinstance(table, Training)
    options: dict[str, Any] = {
        "text_field": table.text_field,
        "bad_records": config.training.bad_records,
        "split": "train" if training else "validation",
        "outputs": [Path(config.job.dump_folder, x) for x in written],
        "key": "training.dataset_path" if training else "validation.dataset_path",
    }
    if not isinstance(table, Training) or not table.mixture:
        return build_source(table.dataset, table.dataset_path, **options)
    shares, names = zip(*map(parse_entry, table.mixture), strict=True)
    if not 0.99 < (total := math.fsum(shares)) < 1.01:
        raise UserError(
            f"training.mixture: the weights are {total:g} in all, expected 1: each is a share of"
            " the windows"
        )
    sources = [find_source(name, **(options | {"key": "training.mixture"})) for name in names]
    for share, source in zip(shares, sources, strict=True):
        logger.info("dataset %s: %.3g%% of the windows", source.name, 100 * share / total)
    return Mixture(sources, [share / total for share in shares])


def parse_entry(entry: str) -> tuple[float, str]:
    """Share and name of one entry of training.mixture."""
    weight, _, name = entry.strip().partition(" ")
    try:
        share = float(weight)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1 or not name.strip():
        raise UserError(
            f"training.mixture: found {entry!r}, expected a weight above 0 and at most 1, a space,"
            ' and a dataset, file, folder or glob, as in "0.3 /data/code/**/*.jsonl"'
        )
    return share, os.path.expanduser(name.strip())
