"""TOML into a configuration."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchtitan_mtp.config.names import find
from torchtitan_mtp.config.setting import Option
from torchtitan_mtp.config.values import accept
from torchtitan_mtp.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(path: str | Path, options: dict[str, Option]) -> dict[str, Any]:
    """The values that a TOML file gives, checked for name and type, by dotted name of the key.

    Raises:
        UserError: the file can't be read or is not TOML; a table or key is unknown or given twice;
            a value is of the wrong type.
    """
    tables = _load(path)
    given: dict[str, Any] = {}
    written_as: dict[str, str] = {}
    for name, value in _keys(tables, (), options, f"{path}: "):
        option = find(name, options, f"{path}: ", "key")
        if option.name in given:
            both = f"{written_as[option.name]} and {name}"
            raise UserError(f"{path}: {both} are two names of one key; keep one of them")
        given[option.name] = accept(option, value, f"{path}: {name}")
        written_as[option.name] = name
    return given


def _load(path: str | Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise UserError(f"{path}: not valid TOML: nested too deeply") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path of the config file") from None
    except (OSError, ValueError) as error:
        # ValueError: a path with a NUL byte, or an integer of thousands of digits.
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path!s}: can't be read: {reason}") from None


def _keys(
    table: dict[str, Any], path: tuple[str, ...], options: dict[str, Option], where: str
) -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every key below a table; empty tables are checked by name."""
    for key, value in table.items():
        name = ".".join((*path, key))
        option = options.get(name)
        if not isinstance(value, dict):
            if option is not None and option.is_table:
                raise UserError(f"{where}[{name}] is a table, found a value; write [{name}]")
            yield name, value
        elif option is not None and not option.is_table:
            yield name, value  # a table where a value belongs: refused with its type
        else:
            if option is None:
                find(name, options, where, "table")
            yield from _keys(value, (*path, key), options, where)
