"""Adapter files, addressed by their content: a local folder by default, an object store by URL.

    <root>/<blob[:2]>/<blob>/adapter_config.json
                             adapter_model.safetensors

A blob is never changed. In a local folder it appears whole, by one rename after everything was synced. In an
object store its two objects are written one after the other; nothing names the blob before both are there.
"""

import os
import re
import secrets
import time
from pathlib import Path
from typing import Any, Final, Protocol

import fsspec
from fsspec.utils import stringify_path

from manylora.catalog.cache import DownloadCache
from manylora.catalog.files import (
    ADAPTER_FILES,
    blob_of_folder,
    clear_folder,
    copy_durably,
    remove_tree,
    sync_folder,
)
from manylora.catalog.lockfile import FolderLock
from manylora.errors import AdapterLoadFailed, StartupError, Unavailable

_BLOB: Final = re.compile(r"[0-9a-f]{64}")
# Several servers can share an object store; one that was just written may belong to an upload of another server.
_SHARED_GRACE_S: Final = 3600.0


class Store(Protocol):
    """Blobs by address. Methods block: call them from a worker thread."""

    def put(self, folder: Path, blob: str) -> None:
        """Keep the two files of `folder`, durably. Keeping a blob again is harmless. Raises Unavailable."""
        ...

    def has(self, blob: str) -> bool: ...

    def local_folder(self, blob: str) -> Path:
        """A local folder with the blob's two files. Raises AdapterLoadFailed."""
        ...

    def remove(self, blob: str) -> None: ...

    def sweep(self, referenced: set[str]) -> list[str]:
        """Remove what no version refers to and what was left half written; what was removed."""
        ...

    def close(self) -> None: ...


def open_store(url: str, cache: Path) -> Store:
    """The store behind a URL; `cache` is a local folder for copies of remote blobs. Raises StartupError."""
    if url.startswith("file://") or "://" not in url:
        return LocalStore(Path(url.removeprefix("file://")))
    try:
        filesystem, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise StartupError(f"store_url {url}: {error}. For s3:// install 'manylora[s3]'.") from error
    except ValueError as error:
        raise StartupError(f"store_url {url} is not usable: {error}") from error
    return RemoteStore(filesystem, stringify_path(root), DownloadCache(cache))


class LocalStore:
    """Blobs in a folder of this machine, which belongs to one server. Raises StartupError if it has another."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._lock = FolderLock(self._root)
        self._incoming = self._root / "incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)

    def _folder(self, blob: str) -> Path:
        return self._root / blob[:2] / blob

    def put(self, folder: Path, blob: str) -> None:
        target = self._folder(blob)
        if target.is_dir():
            return
        staging = self._incoming / secrets.token_hex(8)
        try:
            staging.mkdir()
            for name in ADAPTER_FILES:
                copy_durably(folder / name, staging / name)
            sync_folder(staging)
            if not target.parent.is_dir():
                target.parent.mkdir(exist_ok=True)
                sync_folder(self._root)
            if not target.is_dir():
                staging.rename(target)
            sync_folder(target.parent)
        except OSError as error:
            raise Unavailable(f"The adapter's files cannot be stored: {error}. Check the disk.") from error
        finally:
            remove_tree(staging)

    def has(self, blob: str) -> bool:
        return self._folder(blob).is_dir()

    def local_folder(self, blob: str) -> Path:
        folder = self._folder(blob)
        if not folder.is_dir():
            raise AdapterLoadFailed(f"The store has lost the files of blob {blob}: {folder} is missing.")
        return folder

    def remove(self, blob: str) -> None:
        target = self._folder(blob)
        doomed = self._incoming / secrets.token_hex(8)
        try:
            target.rename(doomed)  # gone in one step, so that no crash leaves half a blob under its address
        except FileNotFoundError:
            return
        sync_folder(target.parent)
        remove_tree(doomed)

    def sweep(self, referenced: set[str]) -> list[str]:
        clear_folder(self._incoming)
        removed = []
        for folder in self._root.glob("??/*"):
            if _BLOB.fullmatch(folder.name) and folder.name not in referenced:
                self.remove(folder.name)
                removed.append(folder.name)
        return removed

    def close(self) -> None:
        self._lock.release()


class RemoteStore:
    """Blobs in whatever fsspec can reach, with copies of those in use on the local disk."""

    def __init__(self, filesystem: Any, root: str, cache: DownloadCache) -> None:
        self._filesystem = filesystem
        self._root = root.rstrip("/")
        self._cache = cache

    def _key(self, blob: str, name: str = "") -> str:
        return f"{self._root}/{blob[:2]}/{blob}" + (f"/{name}" if name else "")

    def put(self, folder: Path, blob: str) -> None:
        try:
            for name in ADAPTER_FILES:
                self._filesystem.put_file(os.fspath(folder / name), self._key(blob, name))
        except OSError as error:
            raise Unavailable(f"The adapter's files cannot be stored: {error}. Check store_url.") from error

    def has(self, blob: str) -> bool:
        return all(self._filesystem.exists(self._key(blob, name)) for name in ADAPTER_FILES)

    def local_folder(self, blob: str) -> Path:
        return self._cache.folder(blob, self._download)

    def _download(self, blob: str, target: Path) -> None:
        try:
            for name in ADAPTER_FILES:
                self._filesystem.get_file(self._key(blob, name), os.fspath(target / name))
        except OSError as error:
            raise AdapterLoadFailed(f"Blob {blob} cannot be fetched from the store: {error}") from error
        if blob_of_folder(target) != blob:
            raise AdapterLoadFailed(f"Blob {blob} came back from the store with other bytes than went in.")

    def remove(self, blob: str) -> None:
        self._cache.remove(blob)
        for name in ADAPTER_FILES:
            if self._filesystem.exists(self._key(blob, name)):
                self._filesystem.rm_file(self._key(blob, name))

    def sweep(self, referenced: set[str]) -> list[str]:
        self._cache.sweep()
        youngest: dict[str, float] = {}
        for path, info in self._filesystem.find(self._root, detail=True).items():
            blob = path.rsplit("/", 2)[-2]
            if _BLOB.fullmatch(blob) and blob not in referenced:
                modified = self._filesystem.modified(path) if "LastModified" not in info else info["LastModified"]
                youngest[blob] = max(youngest.get(blob, 0.0), modified.timestamp())
        old = [blob for blob, written in youngest.items() if time.time() - written > _SHARED_GRACE_S]
        for blob in old:
            self.remove(blob)
        return old

    def close(self) -> None:
        """Nothing is held between calls."""
