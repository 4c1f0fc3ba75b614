"""Words of files that earlier versions of this program wrote or read."""

import functools
import logging
import os
from typing import Any

logger = logging.getLogger(__name__)


def use_todays_words(tables: dict[str, Any], where: str) -> None:
    """Replace in the tables of a TOML file what had another name, or has one way now; a line of log
    says so.

    `mtp.engine` was "joint" by default, or "sequential", and a chain was trained head by head under
    both. `loss.backend` was "chunked" by default.
    """
    mtp, loss = (tables.get(name, {}) for name in ("mtp", "loss"))
    if not (isinstance(mtp, dict) and isinstance(loss, dict)):
        return  # the reader refuses it
    engine, backend = mtp.get("engine"), loss.get("backend")
    if engine == "sequential":
        mtp["engine"] = "head_by_head"
        _say(f'{where}mtp.engine = "sequential" is called "head_by_head" now')
    elif engine == "joint" and mtp.get("heads") == "sequential":
        mtp["engine"] = "head_by_head"
        _say(f'{where}mtp.engine = "joint": a chain trains "head_by_head", to the same gradients')
    if backend in ("chunked", "naive", "torch"):
        del loss["backend"]
        if backend != "chunked":
            _say(f'{where}loss.backend = "{backend}": computed in chunks now, the same to rounding')


@functools.cache
def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        logger.warning(line)
