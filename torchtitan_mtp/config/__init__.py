"""The configuration of a run: dataclasses of every table, read from TOML and the command line."""

from torchtitan_mtp.config.checks import check
from torchtitan_mtp.config.job_config import JobConfig
from torchtitan_mtp.config.manager import load_toml, parse_args
from torchtitan_mtp.config.toml_writer import to_toml

__all__ = ["JobConfig", "check", "load_toml", "parse_args", "to_toml"]
