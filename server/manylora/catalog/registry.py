"""The registry: every adapter and version in SQL, each change one transaction, mirrored in the directory.

A change is visible once its transaction is on disk and not before. One lock covers commit and mirror together,
so the directory goes through the same states in the same order as the database.
"""

import heapq
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from manylora.catalog import canaries, history, mixes, queries
from manylora.catalog.base_signature import BaseSignature
from manylora.catalog.defaults import NO_DEFAULTS
from manylora.catalog.directory import Directory, Entry, missing
from manylora.catalog.labels import Label, active_of
from manylora.catalog.records import (
    AdapterRecord,
    ChangePage,
    Folder,
    NewVersion,
    Published,
    VersionPage,
    VersionRecord,
    Wish,
    new_id,
    now_us,
    version_record,
)
from manylora.database.database import Database, traced_revision_in
from manylora.database.tables import AdapterRow, FolderContentRow, FolderRow, RetiredRow, VersionRow
from manylora.errors import Conflict
from manylora.identity import SERVER, AdapterRef, Author, Mix
from manylora.usage.store import note_stored


class _Transaction:
    """One write: its session, its revision, and what the directory has to take over once it is committed."""

    def __init__(self, session: Session, base: BaseSignature) -> None:
        self.session = session
        self.revision, self.num_untraced = traced_revision_in(session, "catalog")
        self._base = base
        self.changed: dict[tuple[str, str], Entry | None] = {}

    def mirror(self, row: AdapterRow) -> AdapterRecord:
        """Note the adapter, as the transaction has it by now, for the directory."""
        row.revision = self.revision
        canaries.settle(self.session, row)
        self.session.flush()
        (record,) = queries.load_records(self.session, [row], self._base)
        note_stored(self.session, record.tenant, record.name, record.sums.size_bytes, now_us())
        queries.count_kept(self.session, row, record.sums.size_bytes)
        entry = next(iter(queries.entries(self.session, self._base, [row.id])), None)
        self.changed[record.tenant, record.name] = entry
        return record


@dataclass(frozen=True, slots=True)
class Changes:
    """What a look at the database brought: adapters by tenant and name (None: perhaps all), versions that are gone."""

    names: tuple[tuple[str, str], ...] | None
    gone: list[AdapterRef]


class Registry:
    """Adapters and versions. Thread-safe. Methods run queries: call them from a worker thread.

    `base` names the shapes of the base model that runs now: versions made for others are kept and not served.
    """

    def __init__(self, database: Database, base: BaseSignature) -> None:
        self.directory = Directory()
        self._database = database
        self._base = base
        self._lock = threading.Lock()
        self._seen = -1
        self._made = -1
        self._num_untraced = -1
        self.refresh()

    # reading

    @property
    def seen(self) -> int:
        """The catalog's revision up to which the directory has every server's changes."""
        return self._seen

    @property
    def revision(self) -> int:
        """The last revision that is known here: seen, or made by this server after changes that it has not seen."""
        return max(self._seen, self._made)

    @property
    def let_go(self) -> int:
        """The revision up to which every deleted version has been released here."""
        with self._lock:
            return self.directory.let_go(self._seen)

    def get_version(self, tenant: str, name: str, number: int) -> tuple[AdapterRecord, VersionRecord]:
        """The tenant's adapter and one version of it. Raises AdapterNotFound."""
        with self._database.read() as session:
            row = queries.get_adapter(session, tenant, name)
            version = version_record(row, queries.get_version(session, row, number), self._base)
            return queries.load_records(session, [row], self._base)[0], version

    def versions(self, tenant: str, name: str, limit: int, before: int | None) -> tuple[AdapterRecord, VersionPage]:
        """The tenant's adapter with the newest `limit` of its versions older than `before`, None: with its newest ones.

        The active version is among the newest ones, whatever its number, as one more. Raises AdapterNotFound.
        """
        with self._database.read() as session:
            row = queries.get_adapter(session, tenant, name)
            found = queries.versions_before(session, row, before, limit + 1)
            page = found[limit - 1 :: -1]
            next_before = page[0].version if len(found) > limit else None
            active = queries.find_version(session, row, row.active_version) if before is None else None
            if active is not None and active not in page:
                page.insert(0, active)
            versions = tuple(version_record(row, version, self._base) for version in page)
            return queries.load_records(session, [row], self._base)[0], VersionPage(versions, next_before)

    def page(self, tenants: Sequence[str] | None, limit: int, after: str | None) -> tuple[list[AdapterRecord], bool]:
        """Adapters newest first, after the adapter with id `after`; and whether there are more.

        `tenants` None means everybody's. One indexed range per tenant, so a page costs the same at any depth.
        Raises InvalidRequest when `after` is not an id that these tenants have or had.
        """
        with self._database.read() as session:
            start = None if after is None else queries.page_start(session, tenants, after)
            ranges = [queries.page_query(t, start, limit + 1) for t in ([None] if tenants is None else tenants)]
            found = [session.execute(query).scalars().all() for query in ranges]
            rows = list(heapq.merge(*found, key=lambda row: (row.created, row.id), reverse=True))[: limit + 1]
            return queries.load_records(session, rows[:limit], self._base), len(rows) > limit

    def history(self, tenant: str, name: str, limit: int, before: int | None) -> ChangePage:
        """The newest `limit` changes to the tenant's adapter before the change `before`. Raises AdapterNotFound."""
        with self._database.read() as session:
            return history.of_adapter(session, queries.get_adapter(session, tenant, name), limit, before)

    def changes(self, tenant: str | None, limit: int, before: int | None) -> ChangePage:
        """The newest changes to all that is one tenant's, None: to everything, what is deleted by now included."""
        with self._database.read() as session:
            return history.of_tenants(session, tenant, limit, before)

    def folders(self) -> dict[str, tuple[Folder, bool]]:
        """What `--adapters` registered, by path, and whether that version still exists."""
        query = select(FolderRow, VersionRow.id).outerjoin(VersionRow, VersionRow.id == FolderRow.version_id)
        with self._database.read(is_long=True) as session:
            rows = session.execute(query).all()
            return {row.path: (Folder(row.path, row.fingerprint), found is not None) for row, found in rows}

    def blobs(self) -> set[str]:
        """Every blob that a version refers to."""
        with self._database.read(is_long=True) as session:
            return set(session.execute(select(VersionRow.blob).where(VersionRow.blob != "").distinct()).scalars())

    def has_version(self, version_id: str) -> bool:
        """Whether the database has the version now, which another server may have deleted."""
        with self._database.read() as session:
            return session.get(VersionRow, version_id) is not None

    def is_referenced(self, blob: str, *, but: str | None = None) -> bool:
        """Whether a version has these files, one that was deleted and not yet freed among them, other than `but`."""
        kept = select(VersionRow.id).where(VersionRow.blob == blob)
        held = select(RetiredRow.version_id).where(RetiredRow.blob == blob, RetiredRow.version_id != (but or ""))
        with self._database.read() as session:
            return session.execute(kept.union_all(held).limit(1)).first() is not None

    def check_quota(self, tenant: str, name: str, size_bytes: int, *, pinned: bool) -> None:
        """Whether one more version may be kept. Raises QuotaExceeded. `publish` checks again, in its transaction."""
        with self._database.read() as session:
            row = queries.find_adapter(session, tenant, name)
            queries.check_kept(session, tenant, row, size_bytes)
            if pinned and not (row is not None and row.pinned):
                queries.check_pins(session, tenant)

    # writing

    def publish(self, wish: Wish, new: NewVersion, *, folder: Folder | None = None) -> Published:
        """Add a version, or take the newest one where it has the same digest; either becomes active if asked.

        The first version of a name that fits this base becomes active unless it may not. Raises QuotaExceeded.
        """
        with self._write() as transaction:
            return self._add(transaction, wish, new, folder)

    def publish_mix(self, wish: Wish, mix: Mix) -> Published:
        """`publish` for a version that is a mix of these versions. Raises Conflict where one of them was deleted."""
        with self._write() as transaction:
            new = mixes.new_version(transaction.session, new_id("version"), mix, self._base)
            return self._add(transaction, wish, new, None)

    def _add(self, transaction: _Transaction, wish: Wish, new: NewVersion, folder: Folder | None) -> Published:
        session = transaction.session
        row = queries.find_adapter(session, wish.tenant, wish.name)
        newest = self._newest(session, row, new.digest, wish)
        is_new = newest is None or newest.mix != new.mix
        if newest is None or is_new:
            if wish.activate is None:
                wish = replace(wish, activate=row is None or not self._is_decided(session, row))
            elif folder is not None and row is not None and self._was_left(session, row, new, wish):
                wish = replace(wish, activate=False)
            queries.check_kept(session, wish.tenant, row, new.size_bytes + wish.card_bytes)
            row = queries.revived_adapter(session, row, wish.tenant, wish.name)
            newest = queries.add_version(session, row, new, self._base.value, wish.defaults or NO_DEFAULTS)
        assert row is not None
        return self._finish(transaction, wish, row, newest, is_new=is_new, folder=folder)

    def republish(self, wish: Wish, digest: str, *, folder: Folder | None = None) -> Published | None:
        """`publish` for a digest that the newest version has already; None, and nothing done, where it has not."""
        with self._write() as transaction:
            row = queries.find_adapter(transaction.session, wish.tenant, wish.name)
            newest = self._newest(transaction.session, row, digest, wish)
            if row is None or newest is None:
                return None
            return self._finish(transaction, wish, row, newest, is_new=False, folder=folder)

    def was_in_folder(self, wish: Wish, digest: str, folder: Folder) -> tuple[bool, Published | None]:
        """Whether a living adapter of that name had this content before, and the version that has it, if it is kept.

        A folder brings a content in once. Which version is active is then somebody's decision, which no start of an
        older image, and none with the same files in another place, may undo.
        """
        with self._write() as transaction:
            session = transaction.session
            row = queries.find_adapter(session, wish.tenant, wish.name)
            if row is None or row.is_deleted:
                return False, None
            is_known = queries.was_known(session, wish, digest, self._base)
            same = queries.version_with(session, row, digest, self._base)
            if same is None or not (is_known or wish.defaults in (None, same.defaults)):
                return is_known, None
            wish = replace(wish, activate=not self._is_decided(session, row))
            return True, self._finish(transaction, wish, row, same, is_new=False, folder=folder)

    def _is_decided(self, session: Session, row: AdapterRow) -> bool:
        """Whether it stands what answers to the name here: a version for this base, or none, as somebody wished.

        An active mix that lacks a part, or a version for another base, answers nobody, so nobody's decision is undone.
        """
        if row.is_deleted:
            return False
        active = queries.find_version(session, row, row.active_version)
        return active is None or (self._base.fits(active.base) and mixes.has_parts(session, active, self._base))

    def _was_left(self, session: Session, row: AdapterRow, new: NewVersion, wish: Wish) -> bool:
        """Whether a folder had the same files before all of them counted, and another version was made active since."""
        active = queries.find_version(session, row, row.active_version)
        is_former = bool(new.former_digest) and queries.was_known(session, wish, new.former_digest, self._base)
        is_left = active is None or active.digest != new.former_digest
        return is_former and is_left and self._is_decided(session, row)

    def _newest(self, session: Session, row: AdapterRow | None, digest: str, wish: Wish) -> VersionRow | None:
        """The newest version, if it is what is uploaded: content, base and, where any came, defaults."""
        newest = None if row is None else queries.newest_version(session, row)
        if newest is None or newest.digest != digest or not self._base.fits(newest.base):
            return None
        return newest if wish.defaults in (None, newest.defaults) else None

    def _finish(
        self,
        transaction: _Transaction,
        wish: Wish,
        row: AdapterRow,
        newest: VersionRow,
        *,
        is_new: bool,
        folder: Folder | None,
    ) -> Published:
        session, was = transaction.session, row.active_version
        if wish.activate:
            row.active_version = newest.version
        fields = _change(session, row, wish.pinned, wish.description)
        if queries.set_card(session, row, newest, wish) and not is_new:
            fields.append("card")
        mixes.check_not_pinned(session, row)
        if is_new or row.active_version != was or fields:
            action = "upload" if is_new else "change" if row.active_version == was else "promote"
            history.note(session, row, wish.author, action, was=was, version=newest.version, fields=fields)
        if folder is not None:
            found = FolderRow(path=folder.path, fingerprint=folder.fingerprint, version_id=newest.id)
            session.merge(found)
            key = queries.content_keys(newest.digest, wish.defaults)[0]
            session.merge(FolderContentRow(name=row.name, digest=key, base=newest.base))
        done = Published(transaction.mirror(row), version_record(row, newest, self._base), is_new)
        if wish.also is not None:
            wish.also(session, done)
        return done

    def update(
        self,
        tenant: str,
        name: str,
        *,
        active_version: int | None = None,
        pinned: bool | None = None,
        description: str | None = None,
        defaults: str | None = None,
        if_active: int | None = None,
        author: Author = SERVER,
    ) -> AdapterRecord:
        """Change what is given, all in one step; `defaults` are those of the version that is active after it.

        Raises AdapterNotFound, QuotaExceeded, or Conflict (another base, no active version, or not `if_active`).
        """
        with self._write() as transaction:
            session = transaction.session
            row = history.expected(queries.get_adapter(session, tenant, name), if_active)
            was = row.active_version
            if active_version is not None:
                version = queries.get_version(session, row, active_version)
                if not self._base.fits(version.base):
                    raise Conflict(
                        f"'{name}@{active_version}' was made for a base of other shapes than the one that is served "
                        "here, so it cannot become active. Promote a version whose status is 'ready'."
                    )
                row.active_version = active_version
            fields: list[str] = []
            if defaults is not None:
                active = queries.find_version(session, row, row.active_version)
                if active is None:
                    raise Conflict(f"'{name}' has no active version whose defaults could be set. Promote one.")
                fields, active.defaults = ["defaults"] if active.defaults != defaults else [], defaults
            fields += _change(session, row, pinned, description)
            mixes.check_not_pinned(session, row)
            if row.active_version != was or fields:
                action = "change" if row.active_version == was else "promote"
                history.note(session, row, author, action, was=was, version=row.active_version, fields=fields)
            return transaction.mirror(row)

    @contextmanager
    def changing(self, tenant: str, name: str) -> Iterator[tuple[Session, AdapterRow]]:
        """One transaction over the tenant's adapter, for what is changed of it elsewhere. Raises AdapterNotFound."""
        with self._write() as transaction:
            row = queries.get_adapter(transaction.session, tenant, name)
            yield transaction.session, row
            transaction.mirror(row)

    def rollback(
        self, tenant: str, name: str, *, if_active: int | None = None, author: Author = SERVER
    ) -> AdapterRecord:
        """Make that version active again which was before the present one; a further call goes back one more.

        Versions that were deleted since, or are for another base, are passed over. Raises AdapterNotFound, or
        Conflict: no such version is known, or not `if_active` is active.
        """
        with self._write() as transaction:
            session = transaction.session
            row = history.expected(queries.get_adapter(session, tenant, name), if_active)
            version, before = history.earlier(session, row, self._base)
            was, row.active_version = row.active_version, version.version
            mixes.check_not_pinned(session, row)
            history.note(session, row, author, "rollback", was=was, version=version.version, before=before)
            return transaction.mirror(row)

    def adopt(self, labels: Sequence[Label]) -> list[Label]:
        """Register versions under the names, numbers and ids that they had, all or none; those that were added.

        Left out are ids that are known, and numbers that another version has by now. Where the adapter has no active
        version, the one that was becomes it (`labels.active_of`).
        """
        added: list[Label] = []
        with self._write() as transaction:
            session, idle = transaction.session, dict[str, tuple[AdapterRow, list[Label]]]()
            known = set(session.execute(select(VersionRow.id)).scalars())
            for label in sorted(labels, key=lambda label: (label.tenant, label.name, label.version)):
                row = queries.find_adapter(session, label.tenant, label.name)
                is_taken = row is not None and queries.find_version(session, row, label.version) is not None
                if label.version_id in known or is_taken:
                    continue
                row = queries.revived_adapter(session, row, label.tenant, label.name)
                session.flush()  # the adapter's row first: there is no relationship that would order the two
                session.add(queries.adopted_version(row, label))
                session.execute(delete(RetiredRow).where(RetiredRow.version_id == label.version_id))
                if row.active_version is None:
                    idle.setdefault(row.id, (row, []))[1].append(label)
                row.next_version = max(row.next_version, label.version + 1)
                history.note(session, row, SERVER, "recover", was=row.active_version, version=label.version)
                session.flush()
                added.append(label)
                transaction.mirror(row)
            for row, its in idle.values():
                if (active := active_of(its)) is not None:
                    row.active_version = active.version
                    history.note(session, row, SERVER, "promote", was=None, version=active.version)
                    transaction.mirror(row)
        return added

    def replace_blob(self, old: str, new: str) -> None:
        """Let every version with the files `old` have the files `new`, which hold the same content in other bytes."""
        with self._write() as transaction:
            session = transaction.session
            found = session.execute(select(VersionRow).where(VersionRow.blob == old)).scalars().all()
            for version in found:
                version.blob = new
            for adapter_id in sorted({version.adapter_id for version in found}):
                transaction.mirror(session.get_one(AdapterRow, adapter_id))

    def delete(
        self, tenant: str, name: str, version: int | None = None, *, author: Author = SERVER
    ) -> list[AdapterRef]:
        """Unpublish one version, or all, and give those that are gone.

        Raises AdapterNotFound, or Conflict for the active one of several.
        """
        with self._write() as transaction:
            session = transaction.session
            row = queries.get_adapter(session, tenant, name)
            (entry,) = queries.entries(session, self._base, [row.id])
            removed = [listed for number, listed in entry.versions.items() if version in {None, number}]
            gone = [listed.ref for listed in removed]
            if not gone:
                raise missing(name, version)
            is_last = len(gone) == len(entry.versions)
            if not is_last and version == row.active_version:
                raise Conflict(
                    f"'{name}@{version}' is active and other versions exist: promote another one first, "
                    "or delete the whole adapter."
                )
            label = name if version is None else f"{name}@{version}"
            mixes.check_unused(session, tenant, label, {ref.id for ref in gone})
            those = VersionRow.adapter_id == row.id
            session.execute(delete(VersionRow).where(those if is_last else those & (VersionRow.version == version)))
            was = row.active_version
            if is_last:
                row.is_deleted, row.active_version, row.pinned, row.description = True, None, False, ""
            history.note(session, row, author, "delete", was=was, version=version)
            for listed in filter(lambda listed: listed.blob, removed):  # a mix has no files to wait for
                facts = {"blob": listed.blob, "revision": transaction.revision, "at": now_us()}
                session.add(RetiredRow(version_id=listed.ref.id, **facts))
            transaction.mirror(row)
        return gone

    def refresh(self) -> Changes | None:
        """Take over what other processes changed; one small query, and None, when nothing did.

        Only what changed is read. All is read at first, where the database went back (a backup was restored), and
        where something changed it that left no trace of what.
        """
        with self._lock:
            if self._database.revision("catalog") == self._seen:
                return None
            with self._database.read(is_long=True) as session:
                seen, num_untraced = traced_revision_in(session, "catalog")
                is_traced = seen >= self._seen and num_untraced == self._num_untraced
                changed = queries.changed_names(session, self._seen) if is_traced else {}
                entries = queries.entries(session, self._base, list(changed) if is_traced else None)
            before, self._seen, self._num_untraced = self._seen, seen, num_untraced
            if not is_traced:
                return Changes(None, self.directory.replace(entries, seen))
            now: dict[tuple[str, str], Entry | None] = dict.fromkeys(changed.values())
            now.update({(entry.tenant, entry.name): entry for entry in entries})
            return Changes(tuple(now), self.directory.apply(now, before + 1))

    def check_integrity(self) -> None:
        """Assert that the directory equals the database, and that the rows make sense together."""
        with self._lock, self._database.read() as session:
            self.directory.check_integrity()
            versions = queries.all_versions(session)
            rows = session.execute(select(AdapterRow)).scalars().all()
            queries.check_counts(session, rows, versions)
            history.check(session, rows)
            canaries.check(session, rows)
            for row in rows:
                numbers = [v.version for v in versions.get(row.id, [])]
                assert bool(numbers) != row.is_deleted
                assert all(0 < number < row.next_version for number in numbers)
                assert row.active_version is None or row.active_version in numbers
            listed = sorted(self.directory.entries(), key=lambda e: (e.tenant, e.name))
            assert listed == sorted(queries.entries(session, self._base), key=lambda e: (e.tenant, e.name))

    @contextmanager
    def _write(self) -> Iterator[_Transaction]:
        with self._lock:
            with self._database.write("catalog") as session:
                transaction = _Transaction(session, self._base)
                yield transaction
            self._made = transaction.revision
            # Else another process wrote in between, and `refresh` will look.
            if transaction.revision == self._seen + 1 and transaction.num_untraced == self._num_untraced:
                self._seen = transaction.revision
            self.directory.apply(transaction.changed, transaction.revision)


def _change(session: Session, row: AdapterRow, pinned: bool | None, description: str | None) -> list[str]:
    """Change what is given; the names of what is another now."""
    if pinned and not row.pinned:
        queries.check_pins(session, row.tenant)
    given = {"pinned": pinned, "description": description}
    changed = [name for name, value in given.items() if value is not None and value != getattr(row, name)]
    for name in changed:
        setattr(row, name, given[name])
    return changed
