"""One run at a time writes into a folder."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from torchtitan_mtp.checkpoint.folders import checkpoint_folder
from torchtitan_mtp.checkpoint.remote import RemotePath
from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.errors import UserError

logger = logging.getLogger(__name__)

NAME = "run.lock"


def written_folders(config: JobConfig) -> dict[Path, str]:
    """What one run alone may write to, with the key that sets it: its dump folder, and the folder
    it saves checkpoints to, since another run's key may lead there, too (stores know no locks)."""
    dump = Path(config.job.dump_folder)
    written = {dump.resolve(): "job.dump_folder"}
    checkpoints = checkpoint_folder(dump, config.checkpoint.folder)
    if config.checkpoint.enable and not isinstance(checkpoints, RemotePath):
        written.setdefault(checkpoints.resolve(), "checkpoint.folder")
    return written


def lock_folders(folders: Mapping[Path, str], held: ExitStack) -> None:
    """Make folders (each with the key that sets it) and keep other runs out of them until `held` is
    closed or this process is gone: the lock is the kernel's. Its file only says who had it last.
    Error: another run has one: its host, process and start; or it can't be written to."""
    for folder, key in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = held.enter_context((folder / NAME).open("a+"))
        except OSError as error:
            raise UserError(
                f"{key} = {folder}: can't be written to ({error.strerror}); choose another folder"
            ) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{folder}: another run writes here ({file.read().strip() or 'just started'}); "
                f"wait for its end, stop it, or choose another {key}"
            ) from None
        except OSError as error:  # a file system without locks
            logger.warning("%s: can't be locked (%s): start no second run in it", folder, error)
            continue
        file.truncate(0)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        print(f"host {socket.gethostname()}, process {os.getpid()}, since {now}", file=file)
        file.flush()
