"""Claims about multi-token prediction, tried by this trainer: `python scripts/experiment.py NAME`.

Every run is one of `torchtitan_mtp.train` on one core, with a seed that decides its weights and the
order of its data. Finished runs are kept, so an experiment that was stopped goes on where it was.
What came out is in docs/experiments.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments import arithmetic, curriculum, families, induction, tokens  # noqa: E402
from experiments.intervals import MOST_SEEDS  # noqa: E402
from experiments.report import in_page, rows_of, tables, write  # noqa: E402
from experiments.runs import run_all, workers  # noqa: E402

from torchtitan_mtp.checkpoint.lock import lock_folders  # noqa: E402
from torchtitan_mtp.cli.arguments import exit_status, path  # noqa: E402
from torchtitan_mtp.cli.figures import new_figure  # noqa: E402
from torchtitan_mtp.errors import UserError  # noqa: E402

EXPERIMENTS = {
    "induction": induction.EXPERIMENT,
    "arithmetic": arithmetic.EXPERIMENT,
    "tokens": tokens.EXPERIMENT,
    "families": families.EXPERIMENT,
    "curriculum": curriculum.EXPERIMENT,
}
QUICK = {
    "training.steps": 2,
    "training.seq_len": 48,
    "training.local_batch_size": 2,
    "lr_scheduler.warmup_steps": 1,
}
PUBLISHED, PAGE = ROOT / "docs/experiments", ROOT / "docs/experiments.md"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Exit status 2: an unknown name or option."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    about = "; ".join(f"{name}: {experiment.title}" for name, experiment in EXPERIMENTS.items())
    parser.add_argument(
        "name",
        choices=[*EXPERIMENTS, "all", "page"],
        help=f"{about}; all: one after another; page: only writes the tables of docs/experiments.md"
        " anew, from the files of docs/experiments/",
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant; default: 3")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument(
        "--jobs", type=int, default=cores, help="runs at a time, a core each; default: all cores"
    )
    parser.add_argument(
        "--quick", action="store_true", help="two steps of some variants: only shows that it runs"
    )
    parser.add_argument(
        "--output",
        type=path,
        default=Path("outputs/experiments"),
        help="folder of runs and results; default: outputs/experiments",
    )
    parser.add_argument(
        "--publish",
        action="store_true",
        help="also write results, picture and tables into docs/",
    )
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Errors: numbers out of range, a trial for the documentation, nothing to draw with."""
    if not 2 <= args.seeds <= MOST_SEEDS:
        raise UserError(f"--seeds {args.seeds}: expected 2 to {MOST_SEEDS}; one has no interval")
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: expected 1 or more")
    if args.quick and args.publish:
        raise UserError("--publish: --quick measures nothing; leave one of them out")
    new_figure(1, 1)


def run_experiment(
    name: str, args: argparse.Namespace, pool: ProcessPoolExecutor, held: ExitStack
) -> None:
    """All runs that are missing, then results, tables and picture; the folder is this process's
    until `held` is closed. Errors: another process has it; a run fails."""
    experiment, output = EXPERIMENTS[name], args.output.resolve()
    folder = output / (f"{name}-quick" if args.quick else name)
    lock_folders({folder: "--output"}, held)
    experiment.prepare(folder, args.quick)
    runs = experiment.runs(folder, range(args.seeds), args.quick)
    if args.quick:
        runs = [replace(run, settings={**run.settings, **QUICK}) for run in runs]
    rows = run_all(runs, folder, pool, args.jobs)
    print(tables(experiment, rows))
    write(name, experiment, rows, output)
    if args.publish:
        write(name, experiment, rows, PUBLISHED)
        write_page([name])


def write_page(names: list[str]) -> None:
    """The tables of experiments in docs/experiments.md, from their files."""
    page = PAGE.read_text(encoding="utf-8")
    for name in names:
        page = in_page(page, name, tables(EXPERIMENTS[name], rows_of(PUBLISHED / f"{name}.json")))
    PAGE.write_text(page, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Exit status 1: an error, told in one line."""
    args = parse_arguments(sys.argv[1:] if argv is None else argv)

    def program() -> None:
        check_arguments(args)
        if args.name == "page":
            write_page(list(EXPERIMENTS))
            return
        # Of the runs: a core each, and no GPU, which they would share and have no need of.
        os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        pool = workers(args.jobs)
        with ExitStack() as held:
            try:
                for name in EXPERIMENTS if args.name == "all" else [args.name]:
                    run_experiment(name, args, pool, held)
            finally:  # runs that have begun end first, those that wait don't begin
                pool.shutdown(cancel_futures=True)

    try:
        return exit_status(program)
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
