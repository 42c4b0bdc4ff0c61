"""Files and rows together: a blob is written before a row names it, and removed after the last one is gone."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

from manylora.catalog.database import Database
from manylora.catalog.download import pack
from manylora.catalog.records import VersionRecord
from manylora.catalog.registry import Registry
from manylora.catalog.store import Store
from manylora.errors import AdapterLoadFailed
from manylora.lora.ref import AdapterRef

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Blobs:
    """The store under one lock per blob, which other servers on the same database respect. Methods block."""

    def __init__(self, database: Database, registry: Registry, store: Store) -> None:
        self._database = database
        self._registry = registry
        self._store = store
        self._mutex = threading.Lock()
        self._locks: dict[str, tuple[threading.Lock, int]] = {}  # blob -> its lock, and who holds or awaits it

    def keep(self, folder: Path, blob: str, publish: Callable[[], T]) -> T:
        """Store the files and then `publish` the row that names them. If that fails, the files go again."""
        with self._locked(blob):
            try:
                self._store.put(folder, blob)
                return publish()
            except BaseException:
                self._remove_if_free(blob)
                raise

    def free(self, blob: str) -> None:
        """Remove the files unless a version, or a request that began with one, still needs them."""
        with self._locked(blob):
            self._remove_if_free(blob)

    def _remove_if_free(self, blob: str) -> None:
        if not self._registry.is_referenced(blob) and not self._registry.directory.is_retired(blob):
            self._store.remove(blob)

    def local_folder(self, ref: AdapterRef) -> Path:
        """Implements `engine.interface.AdapterSource`."""
        blob = self._registry.directory.blob_of(ref.id)
        if blob is None:
            raise AdapterLoadFailed(f"The adapter {ref.label} is not registered any more.")
        return self._store.local_folder(blob)

    def pack(self, version: VersionRecord, scratch: Path) -> IO[bytes]:
        """The version's files as a .tar.gz. Raises AdapterLoadFailed."""
        with self._locked(version.blob):
            return pack(self._store.local_folder(version.blob), version, scratch)

    def sweep(self) -> None:
        """At start, before anything is served: remove what a crash left half done or unreferenced."""
        for blob in self._store.sweep(self._registry.blobs()):
            _log.warning("Removed an unreferenced blob from the store: %s", blob)

    @contextmanager
    def _locked(self, blob: str) -> Iterator[None]:
        with self._mutex:
            lock, users = self._locks.get(blob, (threading.Lock(), 0))
            self._locks[blob] = (lock, users + 1)
        try:
            with lock, self._database.named_lock(int(blob[:15], 16)):
                yield
        finally:
            with self._mutex:
                lock, users = self._locks.pop(blob)
                if users > 1:
                    self._locks[blob] = (lock, users - 1)
