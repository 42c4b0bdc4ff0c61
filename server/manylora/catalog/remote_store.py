"""Blobs in whatever fsspec can reach. See `catalog.store` for the layout and the contract."""

import hashlib
import os
from io import BufferedReader
from pathlib import Path
from typing import Any

from manylora.catalog.cache import DownloadCache
from manylora.catalog.files import BLOB, Orphan, combine, folder_fault
from manylora.errors import AdapterLoadFailed
from manylora.faults import remote_errors
from manylora.identity import ADAPTER_FILES

_READING = "The store cannot be read"
_WRITING = "The store cannot be written"
_ORPHANS = "orphans"
_CHUNK_BYTES = 2**22


class RemoteStore:
    """Implements `catalog.store.Store`, with copies of the blobs in use on the local disk."""

    is_shared = True

    def __init__(self, filesystem: Any, root: str, cache: DownloadCache) -> None:
        self._filesystem = filesystem
        self._root = root.rstrip("/")
        self._cache = cache

    def _place(self, blob: str, *, is_orphan: bool = False) -> str:
        return f"{self._root}/{_ORPHANS if is_orphan else blob[:2]}/{blob}"

    def put(self, folder: Path, blob: str) -> bool:
        with remote_errors("The adapter's files cannot be stored"):
            was_there = self.has(blob)
            if was_there and self.fault(blob) is None:
                return False
            for name in ADAPTER_FILES:
                self._filesystem.put_file(os.fspath(folder / name), f"{self._place(blob)}/{name}")
        return not was_there

    def has(self, blob: str) -> bool:
        with remote_errors(_READING):
            return all(self._filesystem.exists(f"{self._place(blob)}/{name}") for name in ADAPTER_FILES)

    def fault(self, blob: str, *, is_orphan: bool = False) -> str | None:
        place = self._place(blob, is_orphan=is_orphan)
        with remote_errors(_READING):
            gone = [name for name in ADAPTER_FILES if not self._filesystem.exists(f"{place}/{name}")]
            if gone:
                return f"{' and '.join(gone)} is missing"
            found = combine([self._hash(f"{place}/{name}") for name in ADAPTER_FILES])
        return None if found == blob else "the bytes are not those that were stored"

    def _hash(self, path: str) -> bytes:
        state = hashlib.sha256()
        with self._filesystem.open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                state.update(chunk)
        return state.digest()

    def _fetch(self, place: str, target: Path) -> None:
        """Download those of the objects that exist."""
        for name in ADAPTER_FILES:
            try:
                with remote_errors("The adapter's files cannot be fetched from the store"):
                    if self._filesystem.exists(f"{place}/{name}"):
                        self._filesystem.get_file(f"{place}/{name}", os.fspath(target / name))
            except BaseException:
                (target / name).unlink(missing_ok=True)
                raise

    def local_folder(self, blob: str) -> Path:
        folder = self._cache.folder(blob, self._download)
        if folder_fault(folder, blob) is not None:  # the copy here; the one in the store may be sound
            self._cache.remove(blob)
            folder = self._cache.folder(blob, self._download)
        return folder

    def _download(self, blob: str, target: Path) -> None:
        self._fetch(self._place(blob), target)
        fault = folder_fault(target, blob)
        if fault is not None:
            raise AdapterLoadFailed(f"The adapter's stored files are damaged: {fault}.")

    def remove(self, blob: str) -> None:
        self._cache.remove(blob)
        with remote_errors("The adapter's files cannot be removed"):
            self._delete(self._place(blob))
            self._delete(self._place(blob, is_orphan=True))

    def _delete(self, place: str) -> None:
        for name in ADAPTER_FILES:
            if self._filesystem.exists(f"{place}/{name}"):
                self._filesystem.rm_file(f"{place}/{name}")

    def _objects(self, folder: str) -> dict[str, dict[str, Any]]:
        """The objects below a folder, by path within the root."""
        with remote_errors(_READING):
            start = f"{self._root}/{folder}".rstrip("/")
            found = self._filesystem.find(start, detail=True)
            return {path.removeprefix(f"{self._root}/"): info for path, info in found.items()}

    def _written(self, path: str, info: dict[str, Any]) -> float:
        modified = info.get("LastModified")
        if modified is None:
            with remote_errors(_READING):
                modified = self._filesystem.modified(f"{self._root}/{path}")
        return float(modified.timestamp())

    def blobs(self) -> dict[str, float]:
        youngest: dict[str, float] = {}
        for path, info in self._objects("").items():
            parts = path.split("/")
            if len(parts) == 3 and BLOB.fullmatch(parts[1]) and parts[0] == parts[1][:2]:
                youngest[parts[1]] = max(youngest.get(parts[1], 0.0), self._written(path, info))
        return youngest

    def orphans(self) -> list[Orphan]:
        sizes: dict[str, int] = {}
        since: dict[str, float] = {}
        for path, info in self._objects(_ORPHANS).items():
            parts = path.split("/")
            if len(parts) == 3 and BLOB.fullmatch(parts[1]):
                sizes[parts[1]] = sizes.get(parts[1], 0) + int(info.get("size") or 0)
                since[parts[1]] = max(since.get(parts[1], 0.0), self._written(path, info))
        return [Orphan(blob, sizes[blob], since[blob]) for blob in sorted(sizes)]

    def set_aside(self, blob: str) -> None:
        self._move(self._place(blob), self._place(blob, is_orphan=True))

    def bring_back(self, blob: str) -> bool:
        source, target = self._place(blob, is_orphan=True), self._place(blob)
        with remote_errors(_READING):
            is_there = all(self._filesystem.exists(f"{source}/{name}") for name in ADAPTER_FILES)
        if not is_there or self.has(blob):
            return False
        self._move(source, target)
        return True

    def _move(self, source: str, target: str) -> None:
        """Copy everything, then delete: a kill in between leaves two copies, and the move can be done again."""
        with remote_errors("The adapter's files cannot be moved"):
            there = [name for name in ADAPTER_FILES if self._filesystem.exists(f"{source}/{name}")]
            for name in there:
                self._filesystem.cp_file(f"{source}/{name}", f"{target}/{name}")
            for name in there:
                self._filesystem.rm_file(f"{source}/{name}")

    def drop(self, blob: str) -> None:
        with remote_errors("The files set aside cannot be removed"):
            self._delete(self._place(blob, is_orphan=True))

    def read(self, name: str) -> bytes | None:
        with remote_errors(_READING):
            try:
                return bytes(self._filesystem.cat_file(f"{self._root}/{name}"))
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        with remote_errors(_WRITING):
            self._filesystem.pipe_file(f"{self._root}/{name}", data)

    def erase(self, name: str) -> None:
        with remote_errors(_WRITING):
            if self._filesystem.exists(f"{self._root}/{name}"):
                self._filesystem.rm_file(f"{self._root}/{name}")

    def names(self, folder: str) -> set[str]:
        return {path.removeprefix(f"{folder}/") for path in self._objects(folder)}

    def keep_file(self, name: str, source: Path) -> None:
        with remote_errors(_WRITING):
            self._filesystem.put_file(os.fspath(source), f"{self._root}/{name}")

    def fetch_file(self, name: str, target: Path) -> bool:
        with remote_errors(_READING):
            if not self._filesystem.exists(f"{self._root}/{name}"):
                return False
            self._filesystem.get_file(f"{self._root}/{name}", os.fspath(target))
            return True

    def open_file(self, name: str, copy: Path) -> BufferedReader | None:
        try:
            with remote_errors(_READING):
                return copy.open("rb") if self.fetch_file(name, copy) else None
        finally:
            copy.unlink(missing_ok=True)  # the open file stays

    def tidy(self) -> None:
        self._cache.sweep()

    def close(self) -> None:
        """Nothing is held between calls."""
