"""Who may use a folder: two servers that sweep and write the same files unawares would undo each other's work."""

import errno
import fcntl
import os
from pathlib import Path

from manylora.errors import StartupError
from manylora.faults import file_error

_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


class FolderLock:
    """A lock on a folder. The system lets go of it when the process ends, however it ends.

    Several processes may have it at a time if all ask for it with `is_shared`. `taken` says what to do where somebody
    else has it. Raises StartupError.
    """

    def __init__(self, folder: Path, *, is_shared: bool = False, taken: str = "") -> None:
        taken = taken or f"Another manylora server uses {folder}. Stop it, or give this one another --data-dir."
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartupError(file_error(error, f"The folder {folder} cannot be used").message) from error
        try:
            fcntl.flock(self._descriptor, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            raise StartupError(_reason(error, folder, taken)) from error

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _reason(error: OSError, folder: Path, taken: str) -> str:
    if isinstance(error, BlockingIOError):
        return taken
    if error.errno in _NO_LOCKS:
        return (
            f"The file system of {folder} has no locks, without which two servers would undo each other's work. Use a "
            "folder on another file system, or an object store (store_url)."
        )
    return file_error(error, f"The folder {folder} cannot be locked").message
