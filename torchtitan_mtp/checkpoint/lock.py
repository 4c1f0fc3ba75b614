"""One run at a time writes into a folder."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from torchtitan_mtp.checkpoint.folders import checkpoint_folder
from torchtitan_mtp.checkpoint.remote import RemotePath
from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.errors import UserError

logger = logging.getLogger(__name__)

NAME = "run.lock"


def written_folders(config: JobConfig) -> list[Path]:
    """What one run alone may write to: its dump folder, and its checkpoints' folder where that is
    elsewhere (stores know no locks)."""
    dump = Path(config.job.dump_folder)
    checkpoints = checkpoint_folder(dump, config.checkpoint.folder)
    local = config.checkpoint.enable and not isinstance(checkpoints, RemotePath)
    outside = local and not checkpoints.resolve().is_relative_to(dump.resolve())
    return [dump, checkpoints] if outside else [dump]


def lock_folders(folders: Iterable[Path], held: ExitStack) -> None:
    """Make folders and keep other runs out of them until `held` is closed or this process is gone,
    however it dies: the lock is the kernel's. Its file only says who had it last.

    Raises:
        UserError: another run has one: its host, process and start; or it can't be written to.
    """
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = held.enter_context((folder / NAME).open("a+"))
        except OSError as error:
            raise UserError(
                f"job.dump_folder = {folder}: can't be written to ({error.strerror}); choose "
                "another folder"
            ) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{folder}: another run writes here ({file.read().strip() or 'just started'}); "
                "wait for its end, stop it, or choose another job.dump_folder"
            ) from None
        except OSError as error:  # a file system without locks
            logger.warning("%s: can't be locked (%s): start no second run in it", folder, error)
            continue
        file.truncate(0)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        print(f"host {socket.gethostname()}, process {os.getpid()}, since {now}", file=file)
        file.flush()
