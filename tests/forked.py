"""Python programs as forks of the server of tests/distributed/spawn.py, which has the libraries
imported: a process of its own takes seconds for that."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from spawn import fork_server


def python(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """What `PYTHONPATH=folder python ARGUMENTS` does in that folder."""
    with tempfile.TemporaryDirectory() as place:
        printed = [Path(place, name) for name in ("stdout", "stderr")]
        process = fork_server().Process(
            target=_main, args=(arguments, folder, dict(os.environ), printed), daemon=True
        )
        process.start()
        process.join()
        texts = [file.read_text(encoding="utf-8") for file in printed]
    assert process.exitcode is not None
    return subprocess.CompletedProcess(arguments, process.exitcode, *texts)


def _main(
    arguments: list[str], folder: Path, environment: dict[str, str], printed: list[Path]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for descriptor, path in enumerate(printed, start=1):
        with path.open("w") as file:
            os.dup2(file.fileno(), descriptor)
    # Neither modules nor folders of another checkout of the package, which the server has and
    # pytest added.
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchtitan_mtp"]:
        del sys.modules[name]
    own = ("lib-dynload", "-packages", ".zip", os.path.dirname(os.__file__))
    sys.path[:] = [str(folder), *(path for path in sys.path if path.endswith(own))]
    sys.dont_write_bytecode = False  # what the next one imports is compiled by this one
    match arguments:
        case ["-c", code, *_]:
            sys.argv = ["-c"]
            exec(code, {"__name__": "__main__"})
        case ["-m", module, *_]:
            sys.argv = arguments[1:]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [script, *_]:
            sys.argv = arguments
            sys.path.insert(0, str(Path(script).resolve().parent))
            runpy.run_path(script, run_name="__main__")
