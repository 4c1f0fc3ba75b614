"""TOML into a configuration."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchtitan_mtp.config.earlier import use_todays_words
from torchtitan_mtp.config.names import find
from torchtitan_mtp.config.setting import Option
from torchtitan_mtp.config.values import HERE, accept, printable
from torchtitan_mtp.errors import UserError, reading

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(path: str | Path, options: dict[str, Option]) -> dict[str, Any]:
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
    for name, value in _keys(tables, (), options, where):
        option = find(name, options, where, "key")
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
    table: dict[str, Any], path: tuple[str, ...], options: dict[str, Option], where: str
) -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every table and key below a table."""
    for key, value in table.items():
        name = ".".join((*path, key))
        option = options.get(name)
        if isinstance(value, dict) and option is None:
            find(name, options, where, "table")
        yield name, value
        if option is not None and option.is_table:
            if not isinstance(value, dict):
                raise UserError(f"{where}[{name}] is a table, found a value; write [{name}]")
            yield from _keys(value, (*path, key), options, where)
