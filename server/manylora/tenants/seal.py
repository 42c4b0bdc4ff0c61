"""The fact that a server had API keys, kept outside its database.

Without keys everybody is an admin. A database that was lost, replaced or restored from before the first key must not
open a server that was closed: so the data folder and the store remember, and only a word of the operator lifts that.
"""

from pathlib import Path
from typing import Final, Protocol

from manylora.errors import StartupError
from manylora.faults import file_errors
from manylora.files import sync_folder

__all__ = ["Seal", "reopened"]

_NAME: Final = "had_keys"
_TEXT: Final = b"This server had API keys: without any it is not open again. `manylora keys reopen` lifts that.\n"


class SmallFiles(Protocol):
    """As much of the adapters' store as a mark takes."""

    def read(self, name: str) -> bytes | None: ...

    def write(self, name: str, data: bytes) -> None: ...

    def erase(self, name: str) -> None: ...


class Seal:
    """A mark in the data folder and, where it is given, in the store: either may be lost. Methods block."""

    def __init__(self, data_dir: Path, store: SmallFiles | None = None) -> None:
        self._file = data_dir / _NAME
        self._store = store

    def is_set(self) -> bool:
        """Whether the server is marked as one that had keys. Raises StoreUnavailable."""
        return self.is_in_folder() or (self._store is not None and self._store.read(_NAME) is not None)

    def is_in_folder(self) -> bool:
        """Whether the data folder has the mark. It costs a look at one file."""
        return self._file.exists()

    def set(self) -> None:
        """Mark the server as one that had keys; marking again is harmless. Raises StoreUnavailable or StorageFull."""
        with file_errors("The data folder cannot be written"):
            if not self._file.exists():
                self._file.parent.mkdir(parents=True, exist_ok=True)
                self._file.touch()  # its name is the fact; what it says is for people
                self._file.write_bytes(_TEXT)
                sync_folder(self._file.parent)
        if self._store is not None and self._store.read(_NAME) is None:
            self._store.write(_NAME, _TEXT)

    def lift(self) -> None:
        """Remove the mark. Raises StoreUnavailable."""
        if self._store is not None:
            self._store.erase(_NAME)
        with file_errors("The data folder cannot be written"):
            self._file.unlink(missing_ok=True)


def reopened() -> StartupError:
    """Why a server that had keys does not start without any."""
    return StartupError(
        "This server had API keys and its database has none: was it lost, or is it another one? It would be open to "
        "everybody. Put the right database back; or make a new key: manylora keys create --tenant TENANT --role admin; "
        "or say that it may be open: manylora keys reopen."
    )
