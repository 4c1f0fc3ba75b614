"""The one exception that speaks to the user."""

import importlib
from typing import Any


class UserError(Exception):
    """Something the user can mend, said in one line.

    The message names the file, key, rank or tensor, what was found, what was expected and what to
    do. Entry points print it without a traceback and exit with status 1. What it quotes may have
    several lines; the message has one.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(map(str.strip, message.splitlines())))


def import_optional(module: str, otherwise: str) -> Any:
    """A module of a package that may not be installed: a UserError says `otherwise` then."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(otherwise) from error
