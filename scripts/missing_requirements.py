"""Print the requirements that this Python lacks, one a line, pinned as in constraints.txt.

`python scripts/missing_requirements.py [core|dev|docs]` reads the names and lowest versions from
pyproject.toml. A package that is there and new enough is left alone, whatever constraints.txt says,
so a machine's own build of torch survives. Standard library only: it runs before anything is
installed, by scripts/setup.sh.
"""

import re
import sys
from importlib import metadata
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib  # type: ignore[no-redef]

ROOT = Path(__file__).resolve().parents[1]


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: a pre-release or vendor build counts as its release."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def is_satisfied(requirement: str) -> bool:
    """Whether `name` or `name>=version` is installed for the running Python, or `name; sys_platform
    == "..."` is meant for another system."""
    requirement, _, marker = requirement.partition(";")
    if marker and f'"{sys.platform}"' not in marker:
        return True
    name, _, lowest = requirement.partition(">=")
    try:
        installed = metadata.version(name.strip())
    except metadata.PackageNotFoundError:
        return False
    return release(installed) >= release(lowest)


def pinned(requirement: str, constraints: list[str]) -> list[str]:
    """The constraint lines of one requirement (several where they differ by Python version)."""
    name = re.split(">=|;", requirement)[0].strip()
    return [line for line in constraints if re.match(rf"{re.escape(name)}\s*==", line)]


def main(group: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = list(project["dependencies"])
    if group != "core":
        requirements += project["optional-dependencies"][group]
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    for requirement in requirements:
        if not is_satisfied(requirement):
            print("\n".join(pinned(requirement, constraints) or [requirement]))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "core")
