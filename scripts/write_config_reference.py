"""Writes docs/config.md from the dataclasses of the configuration.

python scripts/write_config_reference.py            write it
python scripts/write_config_reference.py --check    exit with 1 if it is out of date
"""

import argparse
import ast
import inspect
import itertools
import sys
import textwrap
from pathlib import Path
from typing import Any

from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.config.setting import Option, options
from torchtitan_mtp.config.torchtitan import HELD, WITHOUT_EFFECT
from torchtitan_mtp.config.values import show, type_text
from torchtitan_mtp.writing import written_whole

REFERENCE = Path(__file__).resolve().parents[1] / "docs" / "config.md"

INTRODUCTION = """\
# Configuration

<!-- Written by scripts/write_config_reference.py from torchtitan_mtp/config: change it there. -->

A run is described by one TOML file and, over it, the command line:

    ./run_train.sh --job.config_file mtp_8b.toml --training.steps 1000

The command line wins over the file, the file over the defaults below. Options are spelled
`--table.key value` or `--table.key=value`, with `-` or `_`; booleans `--compile.enable` and
`--checkpoint.no_initial_load_model_only`; lists with commas, `--model.converters mtp,float8`.
`--help` prints every option, `--job.print_config` the configuration as it was understood.

Names, types and defaults are those of TorchTitan v0.2 wherever it has the key, so that its TOML
files run unchanged where nothing in them is missing here ([torchtitan.md](torchtitan.md) has each
of them). Its keys that are not supported here have to stay at their defaults; anything else stops
with a line that names the key. So does a key that is unknown, of the wrong type or out of range,
with the nearest right name. A leading `~` of a file or folder is the home folder; in a
TOML file, a leading `{here}` is the folder of that file.
"""

TORCHTITAN = """\
## TorchTitan's other keys

Read, so that its files run unchanged, and dropped.
"""


def field_docs(config_class: Any) -> dict[str, str]:
    """The docstring under each key of a dataclass, on one line.

    Raises:
        ValueError: a key has no docstring; tables have their class's.
    """
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for statement, following in itertools.pairwise(definition.body):
        match statement, following:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                docs[name] = " ".join(text.split())
    for option in options(config_class).values():
        if not option.is_table and len(option.path) == 1 and option.name not in docs:
            raise ValueError(f"{config_class.__name__}.{option.name} has no docstring under it")
    return docs


def reference() -> str:
    """The text of docs/config.md."""
    known = options(JobConfig)
    lines = [INTRODUCTION]
    for table in known.values():
        keys = [o for o in known.values() if o.path[:-1] == table.path and not o.is_table]
        if table.is_table and keys:
            docs = field_docs(table.type)
            lines += [f"## [{table.name}]", "", inspect.getdoc(table.type) or "", ""]
            lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
            lines += [_row(option, docs[option.path[-1]]) for option in keys]
            lines += [""]
    return "\n".join([*lines, *_torchtitan()])


def _torchtitan() -> list[str]:
    """TorchTitan's keys that no table above has."""
    lines = [TORCHTITAN, "| key | has to stay | else |", "| --- | --- | --- |"]
    for name, (default, instead) in HELD.items():
        value = "unset" if default is None else f"`{show(default)}`"
        lines.append(f"| `{name}` | {value} | {instead} |")
    names = [f"`{table}.{key}`" for table, keys in WITHOUT_EFFECT.items() for key in keys.split()]
    lines += ["", "Taken at any value and without effect:", *textwrap.wrap(", ".join(names), 100)]
    return [*lines, ""]


def _row(option: Option, doc: str) -> str:
    rule = option.rule
    kind = type_text(option.type)
    if limits := rule.range_text():
        kind += f" {limits}"
    default = "none" if option.default is None else f"`{show(option.default)}`"
    if rule.also_named:
        doc += " Also read as " + ", ".join(f"`{name}`" for name in rule.also_named) + "."
    cells = [f"`{option.path[-1]}`", kind, default, doc]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="only compare; 1 if out of date")
    text = reference()
    if parser.parse_args().check:
        if not REFERENCE.exists() or REFERENCE.read_text(encoding="utf-8") != text:
            print(f"{REFERENCE}: out of date; run python scripts/write_config_reference.py")
            return 1
        return 0
    REFERENCE.parent.mkdir(exist_ok=True)
    with written_whole(REFERENCE) as file:
        file.write_text(text, encoding="utf-8")
    print(f"wrote {REFERENCE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
