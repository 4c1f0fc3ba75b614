"""The one exception that speaks to the user, and what is made one."""

import contextlib
import errno
import importlib
import os
import re
from collections.abc import Iterator
from typing import Any


class UserError(Exception):
    """Something the user can mend, said in one line.

    The message names the file, key, rank or tensor, what was found, what was expected and what to
    do. Entry points print it without a traceback and exit with status 1. What it quotes may have
    several lines; the message has one.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(map(str.strip, message.splitlines())))


def looked_in(path: str | os.PathLike[str]) -> str:
    """Where a relative path that leads nowhere was looked for; "" for a full one."""
    if os.path.isabs(path):
        return ""
    return f", looked for in {os.getcwd()}: call this from where it holds, or give the full path"


def hub_hint(path: str | os.PathLike[str]) -> str:
    """How to get a model whose name on the Hugging Face hub a path may be; "" for other paths."""
    name = str(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or os.path.exists(name.split("/")[0]):
        return ""
    return f"; if that is a model of the Hugging Face hub: hf download {name} --local-dir FOLDER"


def import_optional(module: str, otherwise: str) -> Any:
    """A module of a package that may not be installed: a UserError says `otherwise` then."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(otherwise) from error


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """While entered, an OSError is a UserError: `what` can't be read."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: can't be read: {error.strerror}") from error


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """While entered, an OSError is a UserError: `what` can't be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: can't be written: {error.strerror or error}") from error


def out_of_memory(error: BaseException | None) -> str:
    """What an error, or one below it, says of memory that there is not, a GPU's or this machine's;
    "" for any other error."""
    if error is None or isinstance(error, UserError):
        return ""
    line = next(iter(str(error).splitlines()), "").rpartition("DefaultCPUAllocator: ")[2]
    cpu = "can't allocate memory" in line or "std::bad_alloc" in line
    if (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and (cpu or type(error).__name__ == "OutOfMemoryError"))
    ):
        return f"out of memory ({line.removesuffix('.')})" if line else "out of memory"
    return out_of_memory(error.__cause__ or error.__context__)


@contextlib.contextmanager
def memory_told(advice: str) -> Iterator[None]:
    """While entered, or as a decorator: an error for lack of memory is a UserError with advice."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if shortage := out_of_memory(error):
            raise UserError(f"{shortage}; {advice}") from error
        raise
