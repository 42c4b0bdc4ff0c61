"""Blobs in a folder of this machine. See `catalog.store` for the layout and the contract."""

import os
import secrets
from contextlib import suppress
from io import BufferedReader
from pathlib import Path

from manylora.catalog.files import BLOB, FolderLock, Orphan, folder_fault
from manylora.errors import AdapterLoadFailed
from manylora.faults import file_errors
from manylora.files import clear_folder, copy_durably, remove_tree, sync_folder, tree_bytes, write_durably
from manylora.identity import ADAPTER_FILES

_READING = "The adapter's files cannot be read"
_STORING = "The adapter's files cannot be stored"
_MOVING = "The adapter's files cannot be moved"
# What is half written in a shared folder may be another server's work in progress.
_OTHERS_WORK_S = 86_400.0


def _taken(root: Path) -> str:
    return (
        f"Another manylora server uses the store {root}. Servers can share it if all of them have the same PostgreSQL "
        "database (database_url); else give this one another store_url or --data-dir."
    )


class LocalStore:
    """Implements `catalog.store.Store`.

    With `is_locked` the folder belongs to this process, or with `is_shared` to servers on one PostgreSQL database,
    whose locks keep them apart (`Database.named_lock`). Raises StartupError if somebody else has it.
    """

    def __init__(self, root: Path, *, is_locked: bool = True, is_shared: bool = False) -> None:
        self._root = root.absolute()
        self.is_shared = is_shared
        self._lock = FolderLock(self._root, is_shared=is_shared, taken=_taken(self._root)) if is_locked else None
        self._incoming = self._root / "incoming"
        self._orphans = self._root / "orphans"

    def _folder(self, blob: str) -> Path:
        return self._root / blob[:2] / blob

    def put(self, folder: Path, blob: str) -> bool:
        with file_errors(_STORING):
            target = self._folder(blob)
            if target.is_dir():
                if folder_fault(target, blob) is not None:
                    self._mend(folder, target)
                return False
            staging = self._new_incoming()
            try:
                staging.mkdir()
                for name in ADAPTER_FILES:
                    copy_durably(folder / name, staging / name)
                sync_folder(staging)
                self._make_parent(target)
                if not target.is_dir():
                    if os.path.lexists(target):  # what is in a folder's place is damage, too
                        target.rename(self._new_incoming())
                    staging.rename(target)
                sync_folder(target.parent)
            finally:
                remove_tree(staging)
        return True

    def _mend(self, folder: Path, target: Path) -> None:
        """Replace file by file: a kill in between leaves it damaged, to be mended again; who reads has the old file."""
        for name in ADAPTER_FILES:
            staging = self._new_incoming()
            try:
                copy_durably(folder / name, staging)
                if (target / name).is_dir() and not (target / name).is_symlink():
                    (target / name).rename(self._new_incoming())
                staging.replace(target / name)
            finally:
                staging.unlink(missing_ok=True)
        sync_folder(target)

    def _new_incoming(self) -> Path:
        self._incoming.mkdir(parents=True, exist_ok=True)
        return self._incoming / secrets.token_hex(8)

    def _make_parent(self, target: Path) -> None:
        if not target.parent.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            sync_folder(target.parent.parent)

    def has(self, blob: str) -> bool:
        return self._folder(blob).is_dir()

    def fault(self, blob: str, *, is_orphan: bool = False) -> str | None:
        with file_errors(_READING):
            return folder_fault(self._orphans / blob if is_orphan else self._folder(blob), blob)

    def local_folder(self, blob: str) -> Path:
        folder = self._folder(blob)
        with file_errors(_READING):
            fault = folder_fault(folder, blob)
        if fault is not None:
            raise AdapterLoadFailed(f"The adapter's stored files are damaged: {fault}.")
        return folder

    def remove(self, blob: str) -> None:
        with file_errors("The adapter's files cannot be removed"):
            for folder in (self._folder(blob), self._orphans / blob):
                self._discard(folder)

    def _discard(self, folder: Path) -> None:
        doomed = self._new_incoming()
        try:
            folder.rename(doomed)  # gone in one step, so that no crash leaves half a blob under its address
        except FileNotFoundError:
            return
        sync_folder(folder.parent)
        remove_tree(doomed)

    def blobs(self) -> dict[str, float]:
        with file_errors(_READING):
            found = {}
            for folder in self._root.glob("??/*"):
                if BLOB.fullmatch(folder.name) and folder.parent.name == folder.name[:2]:
                    with suppress(FileNotFoundError):
                        found[folder.name] = folder.stat().st_mtime
            return found

    def orphans(self) -> list[Orphan]:
        with file_errors(_READING):
            if not self._orphans.is_dir():
                return []
            folders = sorted(f for f in self._orphans.iterdir() if BLOB.fullmatch(f.name))
            return [Orphan(f.name, tree_bytes(f), f.stat().st_mtime) for f in folders]

    def set_aside(self, blob: str) -> None:
        with file_errors(_MOVING):
            source, target = self._folder(blob), self._orphans / blob
            if not source.is_dir():
                return
            self._make_parent(target)
            if target.exists():
                if folder_fault(target, blob) is None:  # set aside before, and sound: one copy is enough
                    os.utime(target)
                    self._discard(source)
                    return
                target.rename(self._new_incoming())
            os.utime(source)  # its days begin now; before the move, so that no crash leaves an old time there
            source.rename(target)
            sync_folder(self._orphans)
            sync_folder(source.parent)

    def bring_back(self, blob: str) -> bool:
        with file_errors(_MOVING):
            source, target = self._orphans / blob, self._folder(blob)
            if not source.is_dir() or target.exists():
                return False
            self._make_parent(target)
            source.rename(target)
            sync_folder(target.parent)
            sync_folder(self._orphans)
            return True

    def drop(self, blob: str) -> None:
        with file_errors("The files set aside cannot be removed"):
            self._discard(self._orphans / blob)

    def read(self, name: str) -> bytes | None:
        with file_errors("The store cannot be read"):
            try:
                return (self._root / name).read_bytes()
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        with file_errors("The store cannot be written"):
            target, staging = self._root / name, self._new_incoming()
            try:
                write_durably(staging, data)
                self._make_parent(target)
                staging.replace(target)
                sync_folder(target.parent)
            finally:
                staging.unlink(missing_ok=True)

    def erase(self, name: str) -> None:
        with file_errors("The store cannot be written"):
            (self._root / name).unlink(missing_ok=True)

    def names(self, folder: str) -> set[str]:
        with file_errors("The store cannot be read"):
            try:
                return {entry.name for entry in (self._root / folder).iterdir()}
            except FileNotFoundError:
                return set()

    def keep_file(self, name: str, source: Path) -> None:
        with file_errors("The store cannot be written"):
            target, staging = self._root / name, self._new_incoming()
            try:
                copy_durably(source, staging)
                target.parent.mkdir(parents=True, exist_ok=True)
                staging.replace(target)
                sync_folder(target.parent)
                sync_folder(target.parent.parent)
            finally:
                staging.unlink(missing_ok=True)

    def fetch_file(self, name: str, target: Path) -> bool:
        with file_errors("The store cannot be read"):
            try:
                copy_durably(self._root / name, target)
            except FileNotFoundError:
                return False
            return True

    def open_file(self, name: str, copy: Path) -> BufferedReader | None:
        with file_errors("The store cannot be read"):
            try:
                return (self._root / name).open("rb")
            except FileNotFoundError:
                return None

    def tidy(self) -> None:
        with file_errors("The store cannot be written"):
            clear_folder(self._incoming, older_than_s=_OTHERS_WORK_S if self.is_shared else 0.0)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()
