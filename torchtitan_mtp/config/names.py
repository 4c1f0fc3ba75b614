"""Names of keys: finding the key that a dotted name means, or the one that was probably meant."""

from difflib import get_close_matches

from torchtitan_mtp.config.setting import Option
from torchtitan_mtp.config.values import printable
from torchtitan_mtp.errors import UserError


def find(name: str, options: dict[str, Option], where: str, kind: str, prefix: str = "") -> Option:
    """The table or key of a dotted name.

    `where` starts a message ("run.toml: "), `kind` and `prefix` are its words for a name ("key" and
    "" in a file, "option" and "--" on the command line).

    Raises:
        UserError: there is no such name; with its new name or the nearest one.
    """
    if name in options:
        return options[name]
    for option in options.values():
        if name in option.rule.also_named:
            return option
    found = f"{where}unknown {kind} {prefix}{printable(name)}"
    if new_name := _new_name(name, options):
        raise UserError(f"{found}; TorchTitan v0.2 renamed it to {prefix}{new_name}")
    if nearest := _nearest(name, options):
        raise UserError(f"{found}; did you mean {prefix}{nearest}?")
    raise UserError(f"{found}; docs/config.md lists all {kind}s")


def _new_name(name: str, options: dict[str, Option]) -> str:
    """The present name of a TorchTitan v0.1 key, or an empty string."""
    for option in options.values():
        for old in option.rule.renamed_from:
            if name == old or name.startswith(old + "."):
                return option.name + name[len(old) :]
    return ""


def _nearest(name: str, options: dict[str, Option]) -> str:
    """The name most like `name`: the same key of another table first, then the closest spelling."""
    table, _, key = name.rpartition(".")
    others = [option.name for option in options.values() if option.path[-1] == key]
    if len(others) == 1:
        return others[0]
    siblings = [other for other in options if other.rpartition(".")[0] == table]
    for candidates, cutoff in ((siblings, 0.7), (list(options), 0.7), (siblings, 0.5)):
        if matches := get_close_matches(name, candidates, n=1, cutoff=cutoff):
            return matches[0]
    return ""
