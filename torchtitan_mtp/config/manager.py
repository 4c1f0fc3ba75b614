"""From a command line or a TOML file to a checked configuration."""

import copy
from pathlib import Path
from typing import Any

from torchtitan_mtp.config.checks import check
from torchtitan_mtp.config.command_line import print_help, read_command_line
from torchtitan_mtp.config.job_config import JobConfig
from torchtitan_mtp.config.toml_reader import read_toml
from torchtitan_mtp.config.torchtitan import check_held, known_options
from torchtitan_mtp.config.values import printable
from torchtitan_mtp.errors import UserError


def parse_args(argv: list[str]) -> JobConfig:
    """The configuration of a command line: its options over its `--job.config_file` over defaults.

    `--help` prints every option and exits.

    Raises:
        UserError: anything in the file or on the command line that is not as it has to be.
    """
    if "--help" in argv or "-h" in argv:
        print_help()
    known = known_options()
    from_command_line = read_command_line(argv, known)
    config_file = from_command_line.get("job.config_file")
    from_file = read_toml(str(config_file), known) if config_file is not None else {}
    return _build(JobConfig(), from_file | from_command_line, config_file)


def load_toml(path: str | Path, base: JobConfig | None = None) -> JobConfig:
    """The configuration of a TOML file, over `base` (default: the defaults), which stays as it is.

    Raises:
        UserError: anything in the file that is not as it has to be.
    """
    start = JobConfig() if base is None else copy.deepcopy(base)
    return _build(start, read_toml(path, known_options()), path)


def _build(config: JobConfig, given: dict[str, Any], file: object) -> JobConfig:
    """`config` with the given values; a combination that can't be is refused, naming the file."""
    known = known_options()
    try:
        for name, value in given.items():
            option = known[name]
            if option.rule.held:
                check_held(option, value)
            elif not option.is_table and not option.rule.without_effect:
                option.set(config, value)
        check(config, given.keys())
    except UserError as error:
        suffix = "" if file is None else f" (config file: {printable(file)})"
        raise UserError(f"{error}{suffix}") from None
    return config
