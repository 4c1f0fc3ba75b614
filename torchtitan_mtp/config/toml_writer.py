"""A configuration into TOML."""

import json
from typing import Any

from torchtitan_mtp.config.job_config import JobConfig
from torchtitan_mtp.config.sections.mtp import MTP
from torchtitan_mtp.config.setting import options


def to_toml(config: JobConfig) -> str:
    """The whole configuration as TOML; `load_toml` of it gives an equal configuration.

    Keys that are None are left out, since TOML has no null and None is their default. So is [mtp]
    while it is at its defaults and its converter is not in model.converters: a file with [mtp] but
    without the converter is refused.
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
            lines.append(f"{option.path[-1]} = {_toml(value)}")
    return "\n".join(lines).lstrip() + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but JSON leaves DEL as it is and TOML does not take it.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return repr(value)
