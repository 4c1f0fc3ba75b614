"""The command line: `--section.key value` in TorchTitan's spellings, and --help.

The words are read here and not by tyro, so that a file and the command line go through one check of
names and types and give the same one-line errors. tyro writes the help.
"""

import tyro

from torchtitan_mtp.config.job_config import JobConfig
from torchtitan_mtp.config.names import find
from torchtitan_mtp.config.setting import Option
from torchtitan_mtp.config.values import accept, from_text, is_boolean, type_text
from torchtitan_mtp.errors import UserError


def read_command_line(argv: list[str], options: dict[str, Option]) -> dict[str, object]:
    """The values that a command line gives, checked for name and type, by dotted name of the key.

    Takes `--a.b value`, `--a.b=value`, `-` for `_`, comma-separated lists, and for booleans
    `--a.flag`, `--a.no_flag`, `--a.flag false`. Of an option given twice the last one counts.

    Raises:
        UserError: an option is unknown or lacks its value; a value is of the wrong type.
    """
    given: dict[str, object] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UserError(f"command line: found {word!r} where an option --section.key belongs")
        name, equals, text = word[2:].partition("=")
        option, negated = _find(name.replace("-", "_"), options)
        where = f"--{option.name}"
        if negated:
            if equals:
                raise UserError(f"--{name}: takes no value, found {text!r}; write {where}={text}")
            given[option.name] = False
            continue
        if not equals:
            text = _next_value(option, words, where)
        given[option.name] = accept(option, from_text(text, option.type), where)
    return given


def print_help() -> None:
    """Prints every option with its type, default and meaning, then exits with status 0."""
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_comma_separated)
    tyro.cli(
        JobConfig,
        prog="torchtitan_mtp.train",
        description="Train a language model with multi-token prediction. "
        "Options override the file of --job.config_file, which overrides the defaults shown here.",
        args=["--help"],
        use_underscores=True,
        registry=registry,
    )


def _find(name: str, options: dict[str, Option]) -> tuple[Option, bool]:
    """The option of a name, and whether the name negates it (`section.no_flag`)."""
    table, _, key = name.rpartition(".")
    if name not in options and key.startswith("no_"):
        positive = options.get(f"{table}.{key.removeprefix('no_')}")
        if positive is not None and is_boolean(positive.type):
            return positive, True
    option = find(name, options, "command line: ", "option", "--")
    if option.is_table:
        raise UserError(f"--{name} is a table; name one of its keys, as in --{name}.key value")
    return option, False


def _next_value(option: Option, words: list[str], where: str) -> str:
    if is_boolean(option.type):
        stated = words and words[0].lower() in ("true", "false")
        return words.pop(0) if stated else "true"
    if words and not words[0].startswith("--"):
        return words.pop(0)
    if option.rule.dropped:  # it may be a flag
        return ""
    raise UserError(f"{where}: expected {type_text(option.type)} after it, found nothing")


def _comma_separated(
    type_info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[list[str]] | None:
    """tyro's rule that shows lists as this module reads them: one comma-separated word."""
    if getattr(type_info.type, "__origin__", None) is not list:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="A,B,...",
        instance_from_str=lambda words: words[0].split(","),
        is_instance=lambda value: isinstance(value, list),
        str_from_instance=lambda value: [",".join(str(item) for item in value)],
    )
