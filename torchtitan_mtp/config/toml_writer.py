"""A configuration into TOML."""

import json
import os
from pathlib import Path
from typing import Any

from torchtitan_mtp.config.job_config import JobConfig
from torchtitan_mtp.config.sections.mtp import MTP
from torchtitan_mtp.config.setting import options
from torchtitan_mtp.config.values import HERE


def to_toml(config: JobConfig, folder: str | None = None) -> str:
    """The whole configuration as TOML; `load_toml` of it gives an equal configuration.

    Keys that are None are left out, since TOML has no null and None is their default. So is [mtp]
    while it is at its defaults and its converter is not in model.converters: a file with [mtp] but
    without the converter is refused.

    folder: where the file is to lie; paths to what is there are written as from the file, so that
        they hold wherever the folder is moved. None: as they are.
    """
    lines: list[str] = []
    unused_mtp = "mtp" not in config.model.converters and config.mtp == MTP()
    for name, option in options(JobConfig).items():
        if unused_mtp and option.path[0] == "mtp":
            continue
        value = option.get(config)
        if option.is_table:
            lines += ["", f"[{name}]"]
        elif value is not None:
            if folder and option.rule.path:
                value = _from(Path(os.path.abspath(folder)), value, name)
            lines.append(f"{option.path[-1]} = {_toml(value)}")
    return "\n".join(lines).lstrip() + "\n"


def _from(folder: Path, value: str, key: str) -> str:
    """A path, from `{here}` on if it leads to what is in `folder`. Others are the user's own, and
    relative names of further folders are below job.dump_folder already."""
    path = Path(os.path.abspath(value))
    below = key.endswith("folder") and key != "job.dump_folder" and not os.path.isabs(value)
    inside = path.is_relative_to(folder) and value not in ("", "byte") and not below
    return str(Path(HERE) / path.relative_to(folder)) if inside and path.exists() else value


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but JSON leaves DEL as it is and TOML does not take it.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return repr(value)
