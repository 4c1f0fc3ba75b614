"""Run the commands that the documentation shows, as a reader would, in a scratch copy.

`python scripts/check_readme.py [FILE ...]` takes every fenced block whose info string is
`bash run` from README.md and docs/*.md, in that order, and runs each with `bash -e` in one copy of
the checkout (what git tracks or would track), the Python that runs this script first in PATH.
A block that is only to be read says plain `bash`. The first block that fails or outlasts
--timeout seconds ends the check with exit code 1.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# An opening fence, its info string, and all lines up to a closing fence at least as long.
FENCE = re.compile(
    r"^(?P<fence>`{3,})(?P<info>[^`\n]*)\n(?P<body>.*?)^(?P=fence)`*[ \t]*$", re.M | re.S
)


class Block(NamedTuple):
    """One fenced block: `line` is the line of its opening fence, from 1."""

    file: Path
    line: int
    commands: str


def find_blocks(file: Path) -> list[Block]:
    """The blocks of a Markdown file that are marked `bash run`."""
    text = file.read_text(encoding="utf-8")
    return [
        Block(file, text.count("\n", 0, match.start()) + 1, match["body"])
        for match in FENCE.finditer(text)
        if match["info"].split() == ["bash", "run"]
    ]


def copy_checkout(target: Path) -> None:
    """Copy what git tracks, or would track, to `target`."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout.decode()
    for name in filter(None, names.split("\0")):
        if os.path.lexists(ROOT / name):  # a file removed but not yet committed is still listed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)


def run_block(block: Block, folder: Path, timeout: float) -> int:
    """Run one block in `folder`; its exit code, or 124 when it ran out of time."""
    # This Python first, and the copy's package before the one installed for the checkout.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(folder)}
    process = subprocess.Popen(
        ["bash", "-e", "-o", "pipefail", "-c", block.commands],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # so that a time-out can end all that the block started
    )
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return 124
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="default: README.md docs/*.md")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one block")
    parser.add_argument("--list", action="store_true", help="print the blocks, run nothing")
    arguments = parser.parse_args()
    files = arguments.files or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        print(f"error: {missing[0]} is not there", file=sys.stderr)
        return 1
    blocks = [block for file in files for block in find_blocks(file)]

    with tempfile.TemporaryDirectory(prefix="check_readme_") as folder:
        copy_checkout(Path(folder))
        for block in blocks:
            where = f"{os.path.relpath(block.file, ROOT)}:{block.line}"
            print(f"--- {where}\n{block.commands.rstrip()}", flush=True)
            if arguments.list:
                continue
            start = time.monotonic()
            code = run_block(block, Path(folder), arguments.timeout)
            seconds = time.monotonic() - start
            if code != 0:
                why = "ran out of time" if code == 124 else f"exited with {code}"
                print(f"error: {where}: {why} after {seconds:.0f} s", file=sys.stderr)
                return 1
            print(f"--- {where}: {seconds:.0f} s", flush=True)
    print(f"{len(blocks)} blocks in {len(files)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
