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
from torchtitan_mtp.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Parse, build, run; the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    debug = any(a.startswith("--job.debug") for a in argv)
    try:
        config = parse_args(argv)
        debug = config.job.debug
        return _run(config)
    except UserError as error:
        if debug:
            raise
        return _fail(str(error))
    except RuntimeError as error:
        if debug or type(error).__name__ != "OutOfMemoryError":  # torch's, maybe not imported
            raise
        return _fail(
            f"{str(error).splitlines()[0]} Lower training.local_batch_size (with "
            'training.global_batch_size), or set activation_checkpoint.mode = "full"'
        )
    except KeyboardInterrupt:  # before the first step: from there on it is a request to stop
        if debug:
            raise
        return _fail("interrupted before the first step; nothing was trained", 130)


def _run(config: JobConfig) -> int:
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    # After the configuration: `--help` and a mistyped key should not wait for torch.
    from torchtitan_mtp.distributed.heartbeat import LostContact
    from torchtitan_mtp.monitoring.logging import init_logging, use_color
    from torchtitan_mtp.monitoring.observer import Observer
    from torchtitan_mtp.trainer import Trainer

    init_logging(rank, size, color=use_color(config.metrics.disable_color_printing))
    if config.job.print_config and rank == 0:
        Observer("stdout").attempt(os.write, 1, f"{to_toml(config)}\n".encode())
    trainer = Trainer(config)
    try:
        trainer.train()
    except BaseException as error:
        # Closing waits for other ranks, and what fails then is not what is to be told.
        if not isinstance(error, LostContact):
            with contextlib.suppress(Exception):
                trainer.close()
        raise
    trainer.close()
    stopped = trainer.stopping.signal
    return 128 + stopped if stopped and trainer.stopped_unsaved else 0


def _fail(message: str, status: int = 1) -> int:
    """Say why, to the user and to torchrun, which shows the first failure of all ranks."""
    rank = os.environ.get("RANK", "0")
    who = f"[rank {rank}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
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
