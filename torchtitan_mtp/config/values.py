"""Values against types: what a key may hold, and how a word of the command line becomes it."""

import json
import os
import types
from contextlib import suppress
from typing import Any, Literal, Union, get_args, get_origin

from torchtitan_mtp.config.setting import Option
from torchtitan_mtp.errors import UserError

# At the beginning of a path in a file: the folder of that file, wherever it is moved.
HERE = "{here}"


def accept(option: Option, value: Any, where: str) -> Any:
    """`value` as the option's type.

    `where` names the place of the value in a message, e.g. "run.toml: training.steps".

    Raises:
        UserError: the value is of another type, not among the allowed ones, or not supported. What
            is dropped may be anything.
    """
    if option.rule.dropped:
        return value
    value = [*map(option.rule.spelled, value)] if isinstance(value, list) else value
    try:
        value = _convert(value, option.type)
        return os.path.expanduser(value) if value and option.rule.path else value
    except TypeError as mismatch:
        raise UserError(f"{where}: expected {mismatch}, found {_describe(value)}") from None


def from_text(text: str, expected: Any) -> Any:
    """A command line's word as a TOML value of the expected type, or as it is if it can't be one.

    Lists are comma-separated; `None` is taken where the type allows it.
    """
    expected, optional = _without_none(expected)
    if optional and text.lower() == "none":
        return None
    if get_origin(expected) is list:
        return [from_text(item.strip(), get_args(expected)[0]) for item in text.split(",") if item]
    if expected is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return expected(text) if expected in (int, float) else text
    except ValueError:
        return text


def type_text(expected: Any) -> str:
    """A type in words, e.g. `a list of strings`."""
    expected, _ = _without_none(expected)
    if get_origin(expected) is Literal:
        return "one of " + ", ".join(show(choice) for choice in get_args(expected))
    if get_origin(expected) is list:
        (item,) = get_args(expected)
        if get_origin(item) is Literal:
            return "a list with any of " + ", ".join(show(choice) for choice in get_args(item))
        return {str: "a list of strings", float: "a list of numbers"}[item]
    return {bool: "true or false", int: "an integer", float: "a number", str: "a string"}[expected]


def show(value: Any) -> str:
    """A value as TOML writes it, on one line and cut to a readable length."""
    try:
        text = json.dumps(value, default=str)
    except ValueError:  # Python writes no integer of more than 4300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else text[:77] + "..."


def further_heads(n: int) -> str:
    """Those after head 1, of n: "head 2", "heads 2-4"."""
    return "head 2" if n == 2 else f"heads 2-{n}"


def printable(name: object) -> str:
    """A name or path for a message, escaped where it would break the line."""
    text = str(name)
    return text if text.isprintable() else ascii(text)


def _convert(value: Any, expected: Any) -> Any:
    """`value` as `expected`; TypeError with the expected type in words."""
    bare, optional = _without_none(expected)
    if value is None and optional:
        return None
    if get_origin(bare) is list and isinstance(value, list):
        try:
            return [_convert(item, get_args(bare)[0]) for item in value]
        except TypeError:
            raise TypeError(type_text(bare)) from None
    # `type(...) is` and not isinstance: Python's bool is an int.
    if value in get_args(bare) or type(value) is bare:
        return value
    if bare is float and type(value) is int:
        with suppress(OverflowError):
            return float(value)
    raise TypeError(type_text(bare))


def is_boolean(expected: Any) -> bool:
    """Whether an option of the type may stand as a flag."""
    return _without_none(expected)[0] is bool


def _without_none(expected: Any) -> tuple[Any, bool]:
    """(X, True) for `X | None`, else (the type, False)."""
    if get_origin(expected) in (Union, types.UnionType):
        (bare,) = (choice for choice in get_args(expected) if choice is not type(None))
        return bare, True
    return expected, False


def _describe(value: Any) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "list"}
    kind = "table" if isinstance(value, dict) else names.get(type(value), type(value).__name__)
    return f"{show(value)} ({kind})"
