"""Words of files that earlier versions of this program wrote or read."""

import functools
import logging
import os
from typing import Any

logger = logging.getLogger(__name__)


def use_todays_words(tables: dict[str, Any], where: str) -> None:
    """Replace in the tables of a TOML file what had another name; one line of log says so.

    `mtp.engine` was "joint" by default, with any loss.backend, or "sequential", and a chain was
    trained head by head under both.
    """
    mtp, loss, model = (tables.get(name, {}) for name in ("mtp", "loss", "model"))
    if not all(isinstance(table, dict) for table in (mtp, loss, model)):
        return  # the reader refuses it
    engine, backend = mtp.get("engine"), loss.get("backend", "chunked")
    with_heads = isinstance(model.get("converters"), list) and "mtp" in model["converters"]
    if engine == "sequential":
        mtp["engine"] = "head_by_head"
        _say(f'{where}mtp.engine = "sequential" is called "head_by_head" now')
    elif engine == "joint" and mtp.get("heads") == "sequential" and backend == "chunked":
        mtp["engine"] = "head_by_head"
        _say(f'{where}mtp.engine = "joint": a chain trains "head_by_head", as it always did')
    elif engine is None and with_heads and backend in ("naive", "torch"):
        tables["mtp"] = mtp | {"engine": "joint"}
        _say(f'{where}mtp.engine is "joint", the one for loss.backend = "{backend}"')


@functools.cache
def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        logger.warning(line)
