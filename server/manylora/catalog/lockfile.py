"""One server per data folder: two that sweep and write the same files would undo each other's work."""

import fcntl
import os
from pathlib import Path

from manylora.errors import StartupError


class FolderLock:
    """An exclusive lock on a folder. The system lets go of it when the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartupError(f"The folder {folder} cannot be used: {error}") from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._descriptor)
            raise StartupError(
                f"Another manylora server uses {folder}. Stop it, or give this one another --data-dir."
            ) from error

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
