"""One configuration key: its default and the rules that belong to it.

A key is one dataclass field. What else there is to know about it (range, support, other names) is
written in the same place, so that the reader, the checks, the help and docs/config.md all read
one source.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from math import inf
from operator import attrgetter, ge, gt, le, lt
from typing import Any, get_type_hints

LARGEST = 2**31 - 1  # integer where a key says nothing else
_COMPARE: dict[str, Callable[[float, float], bool]] = {">=": ge, ">": gt, "<=": le, "<": lt}


@dataclass(frozen=True)
class Rule:
    """What a value of a key has to satisfy, and under which other names the key is known."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    special: tuple[float, ...] = ()
    """Values outside the range that have a meaning of their own, such as -1 for "all"."""

    path: bool = False
    """Set for a file or folder: a leading "~" is the home folder."""

    distinct: bool = False
    """Set for a list whose entries have to differ."""

    dropped: bool = False
    """Set for a TorchTitan key that no program here reads."""

    also_spelled: Mapping[str, str] = field(default_factory=dict)
    """Other spellings of a list's entry, each with the one that the program sees."""

    also_named: tuple[str, ...] = ()
    """Dotted names of the same key in other TorchTitan v0.2 releases; accepted."""

    def spelled(self, entry: Any) -> Any:
        """An entry of a list in the spelling that the program sees."""
        return self.also_spelled.get(entry, entry) if isinstance(entry, str) else entry

    def range_error(self, value: object) -> str:
        """The range as text if a number lies outside of it, else an empty string."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value in self.special:
            return ""
        if isinstance(value, int) and self.at_most is None and value > LARGEST:
            return f"at most {LARGEST}"
        # NaN fails every comparison; an infinity is meant only where it is a special value.
        inside = abs(value) < inf and all(
            _COMPARE[sign](value, limit) for sign, limit in self._limits()
        )
        return "" if inside else self.range_text() or "a finite number"

    def range_text(self) -> str:
        """The allowed range, such as "-1 or >= 1"; empty without limits."""
        text = " and ".join(f"{sign} {limit:g}" for sign, limit in self._limits())
        return " or ".join([*(f"{value:g}" for value in self.special), text]) if text else ""

    def _limits(self) -> list[tuple[str, float]]:
        limits = zip(_COMPARE, (self.at_least, self.above, self.at_most, self.below), strict=True)
        return [(sign, limit) for sign, limit in limits if limit is not None]


NO_RULE = Rule()


def setting(default: Any, **rules: Any) -> Any:
    """A dataclass field with a default, of a list what makes it, and a `Rule`."""
    metadata = {"rule": Rule(**rules)}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Option:
    """One key with its place in the tree of tables."""

    path: tuple[str, ...]
    """Attribute names from the root, e.g. ("training", "steps")."""

    type: Any
    default: Any
    rule: Rule

    is_table: bool = False
    """True for a table that holds further keys."""

    @property
    def name(self) -> str:
        """The dotted name: TOML's table and key, and the command line's option."""
        return ".".join(self.path)

    def get(self, config: Any) -> Any:
        """This key's value in `config`."""
        return attrgetter(self.name)(config)

    def set(self, config: Any, value: Any) -> None:
        """Sets this key in `config` in place."""
        for part in self.path[:-1]:
            config = getattr(config, part)
        setattr(config, self.path[-1], value)


def options(config_class: Any, path: tuple[str, ...] = ()) -> dict[str, Option]:
    """Every table and key below a dataclass, by dotted name, in the order of declaration."""
    found: dict[str, Option] = {}
    hints = get_type_hints(config_class)
    defaults = config_class()
    for entry in dataclass_fields(config_class):
        option = Option(
            path=(*path, entry.name),
            type=hints[entry.name],
            default=getattr(defaults, entry.name),
            rule=entry.metadata.get("rule", NO_RULE),
            is_table=hasattr(hints[entry.name], "__dataclass_fields__"),
        )
        found[option.name] = option
        if option.is_table:
            found |= options(option.type, option.path)
    return found
