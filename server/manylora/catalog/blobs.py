"""Files and rows together: a blob is written before a row names it, and removed after the last one is gone.

Deleted for good is only what somebody asked to delete, once no server needs it (`catalog.freeing`), and what an upload
wrote that did not come to its end. What the database merely does not know is set aside, for days, and comes back once
it is known again.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Final

from manylora.catalog import labels
from manylora.catalog.archive import pack
from manylora.catalog.card import texts_of
from manylora.catalog.copies import Copies
from manylora.catalog.directory import missing
from manylora.catalog.files import blob_of_folder
from manylora.catalog.mixes import check_has_files, no_files
from manylora.catalog.records import Published, VersionRecord
from manylora.catalog.registry import Registry
from manylora.catalog.retired import RetiredVersions
from manylora.catalog.store import Store
from manylora.database.database import Database
from manylora.errors import AdapterLoadFailed, DatabaseUnavailable, ManyloraError
from manylora.identity import AdapterRef

_DAY_S: Final = 86_400.0
# Several servers can share an object store; a blob that was just written may belong to an upload of another server.
_SHARED_GRACE_S: Final = 3600.0
# Files of a version that was deleted so long ago go, even if a server does not say that it has let go of it.
LONGEST_HELD_S: Final = 900.0
_log = logging.getLogger(__name__)


class Blobs:
    """The store under one lock per blob, which other servers on the same database respect. Methods block."""

    def __init__(self, database: Database, registry: Registry, store: Store) -> None:
        self.missing: frozenset[str] = frozenset()  # blobs of the registry that the store did not have at start
        self.num_orphans = 0  # at start
        self.count_damaged: Callable[[], None] = lambda: None
        self._database = database
        self._registry = registry
        self.retired = RetiredVersions(database)
        self._store = store
        self._mutex = threading.Lock()
        self._locks: dict[str, tuple[threading.Lock, int]] = {}  # blob -> its lock, and who holds or awaits it

    def keep(self, folder: Path, blob: str, publish: Callable[[], Published]) -> Published:
        """Store the files and then `publish` the row that names them. If that fails, new files go again.

        They stay where the database did not answer: the row may be there, or come yet. A next start sorts that out.
        """
        with self._locked(blob):
            is_new = self._store.put(folder, blob)
            try:
                done = publish()
            except DatabaseUnavailable:
                raise
            except BaseException:
                if is_new:
                    self._remove_if_free(blob)
                raise
            if is_new and done.version.blob != blob:  # meanwhile the same content came in other bytes
                self._remove_if_free(blob)
            self._label(done.version)
        return done

    def relabel(self, version: VersionRecord | None) -> None:
        """Write the label again of a version whose defaults or card changed, or that became active. A mix has none."""
        if version is not None and version.blob:
            with self._locked(version.blob):
                self._label(version)

    def _label(self, version: VersionRecord) -> None:
        try:
            for label in labels.labels_of(self._database, [version.ref.id]):
                label.write_to(self._store)
        except ManyloraError as error:  # the version stands; the next start writes what is missing
            _log.warning("The label of %s was not written: %s", version.ref.label, error.message)

    def free(self, blob: str, version_id: str) -> None:
        """Remove a retired version's files unless another version, or a request that began with one, needs them."""
        with self._locked(blob):
            if self.retired.has(version_id):  # else another server was quicker
                self._store.erase(labels.file_of(blob, version_id))
                self._remove_if_free(blob, but=version_id)
                self.retired.forget(version_id)

    def _remove_if_free(self, blob: str, *, but: str | None = None) -> None:
        if not self._is_needed(blob, but=but):
            self._store.remove(blob)

    def _is_needed(self, blob: str, *, but: str | None = None) -> bool:
        return self._registry.is_referenced(blob, but=but) or self._registry.directory.is_retired(blob)

    def local_folder(self, ref: AdapterRef) -> Path:
        """The folder of an adapter's two files. Implements `engine.interface.AdapterSource`.

        Raises Conflict for a mix, which has none.
        """
        blob = self._registry.directory.blob_of(ref.id)
        if blob is None:
            raise missing(ref.name, ref.version)
        if not blob:
            raise no_files(ref)
        return self._folder(blob, ref)

    def _folder(self, blob: str, ref: AdapterRef) -> Path:
        """The folder of the blob's files. Files without the blob's hash are counted, logged and AdapterLoadFailed.

        Raises AdapterNotFound where another server has deleted the version and this one has not heard of it.
        """
        try:
            try:
                return self._store.local_folder(blob)
            except AdapterLoadFailed:
                if not self._bring_back(blob):
                    raise
                return self._store.local_folder(blob)
        except AdapterLoadFailed as error:
            if not self._registry.has_version(ref.id):
                raise missing(ref.name, ref.version) from error
            self.count_damaged()
            _log.error(
                "%s, blob %s of the store, cannot be served: %s `manylora adapters verify --repair-from DIR` mends it "
                "from a backup, an upload of the same adapter does too.",
                ref.label,
                blob,
                error.message,
            )
            raise

    def mend(self, folder: Path, blob: str) -> None:
        """Take the files in `folder`, whose content a blob has already, where the stored ones are damaged."""
        sent = blob_of_folder(folder)
        with self._locked(blob):
            if sent == blob:
                self._store.put(folder, sent)  # compares, and writes only what is damaged
                return
            if self._store.fault(blob) is None:
                return
        with self._locked(sent):  # the same content in other bytes
            self._store.put(folder, sent)
            self._registry.replace_blob(blob, sent)
        self._set_aside(blob)

    def mend_missing(self, root: Path) -> None:
        """Take what the store had lost at start from the folders at or below `root`."""
        copies = Copies(root)
        for blob in sorted(self.missing):
            folder = copies.find(blob)
            if folder is not None:
                with self._locked(blob):
                    self._store.put(folder, blob)
                _log.warning("The store had lost a blob, which was found in %s: %s", folder, blob)

    def _bring_back(self, blob: str) -> bool:
        with self._locked(blob):
            if not self._store.bring_back(blob):
                return False
        _log.warning("Brought back from orphans/, since the database knows it: %s", blob)
        return True

    def pack(self, version: VersionRecord, scratch: Path) -> IO[bytes]:
        """The version's files as a .tar.gz. Raises AdapterLoadFailed, or Conflict for a mix, which has none."""
        check_has_files(version)
        folder = self._folder(version.blob, version.ref)
        with self._locked(version.blob):
            return pack(folder, version, *texts_of(self._database, version.ref.id), scratch)

    def sweep(self, orphan_days: float) -> None:
        """At start, before anything is served: put store and registry in order. Nothing is deleted but old orphans."""
        self._store.tidy()
        self._forget_retired()
        stored, referenced, aside = self._store.blobs(), self._registry.blobs(), self._store.orphans()
        for orphan in aside:
            if orphan.blob in referenced and orphan.blob not in stored:
                self._bring_back(orphan.blob)
                stored[orphan.blob] = orphan.since
        # One that is in its place as well is set aside again below, for the days from now on.
        needed = referenced | stored.keys()
        old = [o.blob for o in aside if time.time() - o.since > orphan_days * _DAY_S and o.blob not in needed]
        self._drop(old)
        grace_s = _SHARED_GRACE_S if self._store.is_shared else 0.0
        known = referenced | self.retired.blobs()
        unknown = [blob for blob in stored.keys() - known if time.time() - stored[blob] > grace_s]
        num_moved = sum(self._set_aside(blob) for blob in unknown)
        if num_moved:
            until = datetime.fromtimestamp(time.time() + orphan_days * _DAY_S, UTC)
            _log.warning(
                "Moved the files of %d adapters, which the database does not know, to orphans/ in the store. They are "
                "kept until %s. If they should be known: was this database restored from a backup, or is it another "
                "one? `manylora adapters rescan` registers them, `manylora adapters orphans --drop` deletes them.",
                num_moved,
                until.strftime("%Y-%m-%d"),
            )
        self.num_orphans = len({o.blob for o in aside} - set(old) - referenced) + num_moved
        self.missing = frozenset(referenced - stored.keys())
        if self.missing:
            _log.error(
                "The store lacks the files of %d adapters that the database knows: was it restored from an older "
                "backup? `manylora adapters verify` names them; --repair-from DIR brings them back from a backup.",
                len(self.missing),
            )

    def _forget_retired(self) -> None:
        """What a server did not get to before it ended is set aside; what others may be at is left to them."""
        others_s = 0.0 if self._database.is_sqlite else 2 * LONGEST_HELD_S
        self.retired.forget_older(time.time() - others_s)

    def _drop(self, old: list[str]) -> None:
        for blob in old:
            self._store.drop(blob)
        if old:
            labels.forget(self._store, set(old))
            _log.warning(
                "Deleted %d blobs from orphans/, which were there for their days: %s", len(old), ", ".join(old)
            )

    def _set_aside(self, blob: str) -> bool:
        with self._locked(blob):
            if self._is_needed(blob):  # by an upload to another server since the registry was read
                return False
            self._store.set_aside(blob)
        return True

    def write_missing_labels(self, is_closing: Callable[[], bool]) -> None:
        """Write the labels that the store lacks. Runs beside the requests, since many labels take a while."""
        try:
            for label in labels.missing_labels(self._database, self._store):
                if is_closing():
                    return
                label.write_to(self._store)
        except ManyloraError as error:
            _log.warning("Not every label was written, the next start goes on: %s", error.message)

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
