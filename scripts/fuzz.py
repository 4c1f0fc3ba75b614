"""Feed damaged input to everything that reads: `python scripts/fuzz.py configs|files --count N`.

configs: recipes with spans deleted, replaced and repeated, any value in any key, any command line;
each is read and the run planned. files: checkpoints, exports, tokenizers and data with bits
flipped, spans removed, zeroed, moved or taken from other files; each is read as its command does.

Every case must be accepted or refused with a UserError of one line: no other exception, no crash,
no hang, nothing left behind, and no checkpoint loaded that is not what was saved. Prints the
counts; the exit status is 1 when a case did anything else. A case is made of seed and number alone:
`--seed S --first I --count 1` repeats one.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch

from torchtitan_mtp.errors import UserError

Case = Callable[[random.Random, Path], None]
BATCH = 200  # cases in one process
SECONDS = 60  # of the processor, or ten times that by the clock, beyond which a case hangs
MEMORY = 16 << 30  # bytes of address space


class Hang(BaseException):
    """No `except Exception` may hold it."""


def make_cases(kind: str, folder: Path) -> Case:
    """The cases of a kind; files are made in `folder`."""
    if kind == "configs":
        from fuzzing import configs

        return configs.case
    from fuzzing.files import Files

    return Files(folder / "whole").case


def try_case(case: Case, number: int, seed: int, folder: Path) -> tuple[str, str]:
    """What came of a case: ("accepted" | "refused" | what went wrong, the details)."""

    def hang(signum: int, frame: FrameType | None) -> None:
        raise Hang

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for signum in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(signum, hang)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # so that a busy machine is no hang
    signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)
    try:
        case(random.Random(f"{seed}:{number}"), folder)
    except UserError as error:
        one_line = len(str(error).splitlines()) == 1
        return ("refused", "") if one_line else ("not one line", repr(str(error)))
    except SystemExit as error:
        return "exit", repr(error)
    except Hang:
        return "hang", traceback.format_exc()
    except Exception as error:
        return type(error).__name__, traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "accepted", ""


def run_batch(case: Case, numbers: range, seed: int, folder: Path, pipe: int) -> None:
    """Try the cases in this process; a line for each to the pipe."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for number in numbers:
        os.write(pipe, f"{number}\n".encode())
        outcome, details = try_case(case, number, seed, folder)
        if details:
            print(f"case {number}: {outcome}\n{details}", file=sys.stderr, flush=True)
        os.write(pipe, f"{outcome}\n".encode())


def in_child(
    case: Case, numbers: range, seed: int, folder: Path
) -> tuple[Counter[str], int | None]:
    """Counts of outcomes, and the case that killed the process, if one did."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run_batch(case, numbers, seed, folder, write_end)
            status = 0
        finally:
            os._exit(status)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        lines = pipe.read().splitlines()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    counts = Counter(lines[1::2])
    if len(lines) % 2:
        print(f"case {lines[-1]}: the process ended with status {status}", file=sys.stderr)
        return counts, int(lines[-1])
    return counts, None


def fuzz(kind: str, first: int, count: int, seed: int) -> Counter[str]:
    """Try `count` cases; how often each outcome came."""

    place = Path(tempfile.mkdtemp(prefix="fuzz-"))
    counts: Counter[str] = Counter()
    try:
        case = make_cases(kind, place)
        number, end = first, first + count
        while number < end:
            batch = range(number, min(end, number + BATCH))
            found, crashed = in_child(case, batch, seed, place / "case")
            counts += found
            number = batch.stop
            if crashed is not None:
                counts["crash"] += 1
                number = crashed + 1
    finally:
        shutil.rmtree(place)
    return counts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("configs", "files"))
    parser.add_argument("--count", type=int, default=1000, help="cases; default: 1000")
    parser.add_argument("--seed", type=int, default=0, help="of all cases; default: 0")
    parser.add_argument("--first", type=int, default=0, help="number of the first; default: 0")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # of no use here, and not to be forked
    logging.disable()
    warnings.simplefilter("ignore")
    counts = fuzz(args.kind, args.first, args.count, args.seed)
    others = {name: n for name, n in counts.items() if name not in ("accepted", "refused")}
    print(
        f"{args.kind}: {counts.total()} cases, {counts['accepted']} accepted, "
        f"{counts['refused']} refused in one line, {sum(others.values())} otherwise"
        + "".join(f"; {name}: {n}" for name, n in sorted(others.items()))
    )
    return 1 if others else 0


if __name__ == "__main__":
    sys.exit(main())
