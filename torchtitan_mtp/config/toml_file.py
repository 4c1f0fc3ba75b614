"""TOML into a configuration, and back."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchtitan_mtp.config.earlier import use_todays_words
from torchtitan_mtp.config.job_config import JobConfig
from torchtitan_mtp.config.names import find
from torchtitan_mtp.config.sections.mtp import MTP
from torchtitan_mtp.config.setting import Option, options
from torchtitan_mtp.config.values import HERE, accept, printable, show
from torchtitan_mtp.errors import UserError, reading

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(path: str | Path, known: dict[str, Option]) -> dict[str, Any]:
    """The values that a TOML file gives, checked for name and type, by dotted name of the key.

    Tables are in it too, as empty dictionaries: a bare `[mtp]` means something.

    Raises:
        UserError: the file can't be read or is not TOML; a table or key is unknown or given twice;
            a value is of the wrong type.
    """
    tables = _load(path)
    where = f"{printable(path)}: "
    use_todays_words(tables, where)
    given: dict[str, Any] = {}
    written_as: dict[str, str] = {}
    for name, option, value in _keys(tables, (), known, where):
        if option.is_table:
            given[name] = {}
            continue
        if option.name in given:
            both = f"{written_as[option.name]} and {name}"
            raise UserError(f"{where}{both} are two names of one key; keep one of them")
        value = accept(option, value, f"{where}{name}")
        if option.rule.path and value and value.split("/")[0] == HERE:
            value = os.path.abspath(Path(path).parent / value[len(HERE) + 1 :])
        given[option.name] = value
        written_as[option.name] = name
    return given


def _load(path: str | Path) -> dict[str, Any]:
    where = printable(path)
    try:
        with reading(where):
            return tomllib.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no TOML, numbers or nesting too long
        raise UserError(f"{where}: not valid TOML: {error}") from None


def _keys(
    table: dict[str, Any], path: tuple[str, ...], known: dict[str, Option], where: str
) -> Iterator[tuple[str, Option, Any]]:
    """Dotted name, option and value of every table and key below a table."""
    for key, value in table.items():
        name = ".".join((*path, key))
        option = find(name, known, where, "table" if isinstance(value, dict) else "key")
        yield name, option, value
        if option.is_table:
            if not isinstance(value, dict):
                raise UserError(f"{where}[{name}] is a table, found a value; write [{name}]")
            yield from _keys(value, (*path, key), known, where)


def to_toml(config: JobConfig, folder: str | None = None) -> str:
    """The whole configuration as TOML; `load_toml` of it gives an equal configuration.

    Keys that are None are left out, since TOML has no null and None is their default. So is [mtp]
    while it is at its defaults and its converter is not in model.converters: a file with [mtp] but
    without the converter is refused.

    Args:
        folder: where the file is to lie; paths to what is there are written as from the file, so
            that they hold wherever the folder is moved. None: as they are.

    Raises:
        UserError: naming a key whose text, a path's say, is not UTF-8.
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
            try:
                lines[-1].encode()
            except UnicodeEncodeError:
                told = f"{name} = {show(value)}: is not UTF-8, as config.toml has to be"
                raise UserError(f"{told}; rename it") from None
    return "\n".join(lines).lstrip() + "\n"


def _from(folder: Path, value: str, key: str) -> str:
    """A path, from `{here}` on if it leads to what is in `folder`. Others are the user's own, and
    relative names of further folders are below job.dump_folder already."""
    path = Path(os.path.abspath(value))
    below = key.endswith("folder") and key != "job.dump_folder" and not os.path.isabs(value)
    inside = path.is_relative_to(folder) and value not in ("", "byte") and not below
    return str(Path(HERE) / path.relative_to(folder)) if inside and path.exists() else value


def _toml(value: Any) -> str:
    if isinstance(value, float):
        return repr(value)  # JSON has other words for infinities
    # JSON's escapes are TOML's, but JSON leaves DEL as it is and TOML does not take it.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
