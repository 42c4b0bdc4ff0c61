"""Files of the catalog: the two of an adapter, hashes of their bytes, and who may use a folder."""

import errno
import fcntl
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from manylora.errors import StartupError
from manylora.faults import file_error
from manylora.identity import ADAPTER_FILES

BLOB: Final = re.compile(r"[0-9a-f]{64}")
_NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


@dataclass(frozen=True, slots=True)
class Orphan:
    """A blob that was set aside at `since`, in Unix seconds."""

    blob: str
    size_bytes: int
    since: float


def hash_file(path: Path) -> bytes:
    """The sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def blob_of_folder(folder: Path) -> str:
    """The address of an adapter's bytes: the sha256 over the sha256 of its config and of its weights.

    Not the adapter's digest, which is that of the content: two files can hold the same tensors in other bytes,
    and a download must give back the bytes that came in.
    """
    return combine([hash_file(folder / name) for name in ADAPTER_FILES])


def combine(hashes: list[bytes]) -> str:
    return hashlib.sha256(b"".join(hashes)).hexdigest()


def folder_fault(folder: Path, blob: str) -> str | None:
    """What is wrong with the blob's two files in `folder`; None if they are those that the address was made from.

    Raises OSError where they are there and cannot be read.
    """
    # Looked at before they are opened: opening a pipe would wait for a writer.
    gone = [name for name in ADAPTER_FILES if not (folder / name).is_file()]
    try:
        found = "" if gone else blob_of_folder(folder)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        gone = ["a file"]  # until a moment ago it was there
    if gone:
        return f"{' and '.join(gone)} {'is' if len(gone) == 1 else 'are'} missing"
    return None if found == blob else "the bytes are not those that were stored"


class FolderLock:
    """A lock on a folder: two servers that write and sweep the same files would undo each other's work.

    The system lets go of it when the process ends, however it ends. Several processes may have it at a time if all ask
    for it with `is_shared`. `taken` says what to do where somebody else has it. Raises StartupError.
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
