"""One run at a time writes into a folder."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO

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


class FolderLock:
    """Held by one process until it releases it or dies, which the kernel notices however it dies.

    The file says who held it last; whether somebody does, only the kernel knows.
    """

    def __init__(self) -> None:
        self._files: list[IO[str]] = []

    def take(self, folders: Iterable[Path]) -> None:
        """Make the folders and lock them, or none of them.

        Raises:
            UserError: another run holds one, with its host, process and start; or it can't be
                written to.
        """
        try:
            for folder in folders:
                self._lock(folder)
        except BaseException:
            self.release()
            raise

    def _lock(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / NAME).open("a+")
        except OSError as error:
            raise UserError(
                f"job.dump_folder = {folder}: can't be written to ({error.strerror}); choose "
                "another folder"
            ) from None
        self._files.append(file)
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
            return
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"host {socket.gethostname()}, process {os.getpid()}, since {since}\n")
        file.flush()

    def release(self) -> None:
        """Let others in."""
        while self._files:
            self._files.pop().close()
