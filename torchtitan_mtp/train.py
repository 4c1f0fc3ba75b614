"""Entry point: `python -m torchtitan_mtp.train --job.config_file F [--section.key value ...]`.

Exit status: 0 when the run is done, or was told to stop and saved; 1 after an error, said in one
line; 128 + the signal's number when it was told to stop and saves nothing (checkpoint.enable =
false), or was told a second time.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time

from torchtitan_mtp.config import JobConfig, parse_args, to_toml
from torchtitan_mtp.errors import UserError, out_of_memory


def main(argv: list[str] | None = None) -> int:
    """Parse, build, run; the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    debug = any(a.startswith("--job.debug") for a in argv)
    try:
        config = parse_args(argv)
        debug = config.job.debug
        return _run(config)
    except (UserError, KeyboardInterrupt) as error:
        if debug:
            raise
        if isinstance(error, UserError):
            return _fail(str(error))
        # From the first step on it is a request to stop.
        return _fail("interrupted before the first step; nothing was trained", 130)


def _run(config: JobConfig) -> int:
    # After the configuration: `--help` and a mistyped key should not wait for torch.
    from torchtitan_mtp.distributed.heartbeat import LostContact
    from torchtitan_mtp.distributed.mesh import launched
    from torchtitan_mtp.monitoring.logging import init_logging, use_color
    from torchtitan_mtp.monitoring.observer import Observer
    from torchtitan_mtp.trainer import Trainer

    rank, size = launched()
    init_logging(rank, size, color=use_color(config.metrics.disable_color_printing))
    if config.job.print_config and rank == 0:
        Observer("stdout").attempt(os.write, 1, f"{to_toml(config)}\n".encode())
    trainer, where = None, "the start"
    try:
        trainer = Trainer(config)
        trainer.train()
    except BaseException as error:
        if trainer:
            where = trainer.heartbeat.where
            # Closing waits for other ranks, and what fails then is not what is to be told.
            if not isinstance(error, LostContact):
                with contextlib.suppress(Exception):
                    trainer.close()
        if shortage := out_of_memory(error):
            lower = "validation.local_batch_size or validation.seq_len"
            if not where.startswith("validation"):
                lower = "training.local_batch_size (with training.global_batch_size), or set "
                lower += 'activation_checkpoint.mode = "full"'
            raise UserError(f"{where}: {shortage}; lower {lower}") from error
        raise
    trainer.close()
    stopped = trainer.stopping.signal
    return 128 + stopped if stopped and trainer.stopped_unsaved else 0


def _fail(message: str, status: int = 1) -> int:
    """Say why, to the user and to torchrun, which shows the first failure of all ranks."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    who = "" if alone else f"[rank {os.environ.get('RANK', '?')}] "
    print(f"{who}error: {message}", file=sys.stderr)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        record = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError), open(file, "w") as stream:
            json.dump({"message": record}, stream)
    return status


def _open_closed_streams() -> None:
    """Where the process was started without them, output goes nowhere, and not into the files that
    would be given their numbers."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))


def program() -> None:
    """`main` of a process that does nothing else, which ends with it."""
    _open_closed_streams()
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)  # the threads and groups of a failed run can hang in their destructors
    sys.exit(0)


if __name__ == "__main__":
    program()
