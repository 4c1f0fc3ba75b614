"""From a command line or a TOML file to a checked configuration."""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torchtitan_mtp.config.checks import check
from torchtitan_mtp.config.command_line import print_help, read_command_line
from torchtitan_mtp.config.job_config import JobConfig
from torchtitan_mtp.config.setting import Option
from torchtitan_mtp.config.toml_file import read_toml
from torchtitan_mtp.config.torchtitan import HELD, known_options
from torchtitan_mtp.config.values import printable, show
from torchtitan_mtp.errors import UserError

RECIPES = Path(__file__).parents[1] / "train_configs"


def parse_args(argv: list[str]) -> JobConfig:
    """The configuration of a command line: its options over its `--job.config_file` over defaults.

    A config file's bare name that is no file is the recipe of that name. `--help` prints every
    option and exits.

    Raises:
        UserError: anything in the file or on the command line that is not as it has to be.
    """
    if "--help" in argv or "-h" in argv:
        print_help()
    known = known_options()
    given = read_command_line(argv, known)
    file = given.get("job.config_file")
    if file is not None:
        file = _find_config_file(str(file))
        given = read_toml(file, known) | given
    return _build(given, known, file)


def load_toml(path: str | Path) -> JobConfig:
    """The configuration of a TOML file, or of the recipe of that bare name where there is no such
    file, over the defaults.

    Raises:
        UserError: anything in the file that is not as it has to be.
    """
    known, file = known_options(), _find_config_file(str(path))
    return _build(read_toml(file, known), known, file)


def _find_config_file(name: str) -> str:
    """`name`, or the path of the recipe of that bare name. UserError, with the recipes' names,
    where there is neither."""
    if os.path.exists(name):
        return name
    recipes = sorted(path.name for path in RECIPES.glob("*.toml"))
    if name in recipes:
        return str(RECIPES / name)
    nearest = get_close_matches(os.path.basename(name).lower(), recipes, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    found = f"{printable(name)}: no such file; found by name: {', '.join(recipes)}"
    raise UserError(found + hint)


def _build(given: dict[str, Any], known: dict[str, Option], file: object) -> JobConfig:
    """The given values over the defaults; combinations that can't be are refused, with the file."""
    config = JobConfig()
    try:
        for name, value in given.items():
            option = known[name]
            if name in HELD and value != option.default:
                raise UserError(
                    f"{name} = {show(value)}: this TorchTitan key is not supported here yet and "
                    f"has to stay at its default {show(option.default)}; {HELD[name][1]}"
                )
            if not (option.is_table or option.rule.dropped):
                option.set(config, value)
        check(config, given.keys())
    except UserError as error:
        suffix = "" if file is None else f" (config file: {printable(file)})"
        raise UserError(f"{error}{suffix}") from None
    return config
