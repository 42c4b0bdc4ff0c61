"""The registry's queries, each inside a session that the registry holds."""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from types import MappingProxyType
from typing import Final

from sqlalchemy import Select, func, select, tuple_
from sqlalchemy.orm import Session

from manylora.catalog.base_signature import BaseSignature
from manylora.catalog.defaults import formerly
from manylora.catalog.directory import Entry, Listed, missing
from manylora.catalog.interface import Canary
from manylora.catalog.labels import Label
from manylora.catalog.records import (
    AdapterRecord,
    NewVersion,
    VersionSums,
    Wish,
    adapter_record,
    new_id,
    now_us,
    ref_of,
)
from manylora.catalog.saved_mix import parts_of
from manylora.database.tables import AdapterRow, CanaryRow, FolderContentRow, KeptRow, VersionRow
from manylora.errors import InvalidRequest, QuotaExceeded
from manylora.tenants.limits import exceeded, limits_in

# A quota on what is kept frees up by somebody's decision, not by time: come back in a minute, not in a second.
_KEPT_RETRY_S = 60.0
_ROWS_AT_ONCE: Final = 1000
_IDS_AT_ONCE: Final = 1000


def find_adapter(session: Session, tenant: str, name: str) -> AdapterRow | None:
    """An adapter's row, or None; deleted adapters have theirs too."""
    query = select(AdapterRow).where(AdapterRow.tenant == tenant, AdapterRow.name == name)
    return session.execute(query).scalar_one_or_none()


def get_adapter(session: Session, tenant: str, name: str) -> AdapterRow:
    """An adapter's row. Raises AdapterNotFound."""
    row = find_adapter(session, tenant, name)
    if row is None or row.is_deleted:
        raise missing(name)
    return row


def load_records(session: Session, rows: Sequence[AdapterRow], base: BaseSignature) -> list[AdapterRecord]:
    """Records in the order of `rows`. Of their versions only the active ones are read."""
    v, ids = VersionRow, [row.id for row in rows]
    sums = select(v.adapter_id, func.count(), func.max(v.version), func.sum(v.size_bytes + v.card_bytes))
    summed = {
        adapter_id: VersionSums(count, newest, int(size_bytes))
        for adapter_id, count, newest, size_bytes in session.execute(
            sums.where(v.adapter_id.in_(ids)).group_by(v.adapter_id)
        )
    }
    query = select(v).join(AdapterRow, (AdapterRow.id == v.adapter_id) & (AdapterRow.active_version == v.version))
    active = {found.adapter_id: found for found in session.execute(query.where(v.adapter_id.in_(ids))).scalars()}
    return [adapter_record(row, active.get(row.id), summed.get(row.id, VersionSums()), base) for row in rows]


def find_version(session: Session, row: AdapterRow, number: int | None) -> VersionRow | None:
    """The adapter's version of that number, or None."""
    if number is None:
        return None
    query = select(VersionRow).where(VersionRow.adapter_id == row.id, VersionRow.version == number)
    return session.execute(query).scalar_one_or_none()


def get_version(session: Session, row: AdapterRow, number: int) -> VersionRow:
    """The adapter's version of that number. Raises AdapterNotFound."""
    found = find_version(session, row, number)
    if found is None:
        raise missing(row.name, number)
    return found


def versions_before(session: Session, row: AdapterRow, before: int | None, limit: int) -> list[VersionRow]:
    """At most `limit` versions with numbers below `before` (None: all numbers), newest first: one index range."""
    query = select(VersionRow).where(VersionRow.adapter_id == row.id)
    if before is not None:
        query = query.where(VersionRow.version < before)
    return list(session.execute(query.order_by(VersionRow.version.desc()).limit(limit)).scalars())


def all_versions(session: Session) -> dict[str, list[VersionRow]]:
    """Versions of all adapters by the adapter's id, oldest first. Reads all rows: for tests."""
    found: dict[str, list[VersionRow]] = {}
    query = select(VersionRow).order_by(VersionRow.adapter_id, VersionRow.version)
    for version in session.execute(query).scalars():
        found.setdefault(version.adapter_id, []).append(version)
    return found


def changed_names(session: Session, since: int) -> dict[str, tuple[str, str]]:
    """Tenant and name of every adapter that was written after revision `since`, deleted ones too, by the row's id."""
    a = AdapterRow
    found = session.execute(select(a.id, a.tenant, a.name).where(a.revision > since).order_by(a.revision))
    return {row.id: (row.tenant, row.name) for row in found}


def entries(session: Session, base: BaseSignature, ids: Sequence[str] | None = None) -> list[Entry]:
    """Adapters that have versions, as the directory knows them: those with these ids, or all.

    Reads the columns that the directory needs, and not the reports, which are most of a database; many rows come piece
    by piece, so that no other thread waits for a driver that makes all of them at once.
    """
    if ids is None:
        return _entries(session, base, None)
    pieces = (ids[start : start + _IDS_AT_ONCE] for start in range(0, len(ids), _IDS_AT_ONCE))
    return [entry for piece in pieces for entry in _entries(session, base, piece)]


def _entries(session: Session, base: BaseSignature, ids: Sequence[str] | None) -> list[Entry]:
    a, v, c = AdapterRow, VersionRow, CanaryRow
    query = select(
        a.tenant, a.name, a.pinned, a.active_version, v.id, v.version, v.digest, v.blob, v.created, v.base, v.defaults,
        v.virtual_tokens, v.invocation, v.head, v.vocabulary, v.rank, v.mix,
        c.id.label("canary"), c.version.label("tried"), c.share, c.until,
    ).join(v, v.adapter_id == a.id).outerjoin(c, c.id == a.canary)  # fmt: skip
    if ids is not None:
        query = query.where(a.id.in_(ids))
    facts: dict[tuple[str, str], tuple[bool, int | None]] = {}
    canaries: dict[tuple[str, str], Canary] = {}
    versions: dict[tuple[str, str], dict[int, Listed]] = {}
    pieces = query.order_by(a.created, a.id, v.version).execution_options(yield_per=_ROWS_AT_ONCE)
    for row in session.execute(pieces):
        key = (row.tenant, row.name)
        facts[key] = (row.pinned, row.active_version)
        if row.canary is not None:
            canaries[key] = Canary(row.canary, row.tried, row.share, row.until)
        ref, is_ready = ref_of(row, row, row.vocabulary), base.fits(row.base)
        listed = Listed(ref, row.blob, row.created, is_ready, row.defaults, row.rank, parts_of(row.mix))
        versions.setdefault(key, {})[row.version] = listed
    return [Entry(*key, *facts[key], MappingProxyType(versions[key]), canaries.get(key)) for key in facts]


def newest_version(session: Session, row: AdapterRow) -> VersionRow | None:
    query = select(VersionRow).where(VersionRow.adapter_id == row.id).order_by(VersionRow.version.desc()).limit(1)
    return session.execute(query).scalar_one_or_none()


def version_with(session: Session, row: AdapterRow, digest: str, base: BaseSignature) -> VersionRow | None:
    """The newest version with this content for this base."""
    query = select(VersionRow).where(
        VersionRow.adapter_id == row.id, VersionRow.digest == digest, VersionRow.base.in_(base.values)
    )
    return session.execute(query.order_by(VersionRow.version.desc()).limit(1)).scalar_one_or_none()


def content_keys(digest: str, defaults: str | None) -> list[str]:
    """What a folder's content is known by, since with other defaults it is another; what it was known by comes last."""
    texts = dict.fromkeys((defaults, formerly(defaults))) if defaults else ()
    return [f"{digest}+{sha256(text.encode()).hexdigest()[:16]}" for text in texts] or [digest]


def was_known(session: Session, wish: Wish, digest: str, base: BaseSignature) -> bool:
    """Whether a folder of that name has brought in this content for this base."""
    keys = [(wish.name, key, value) for key in content_keys(digest, wish.defaults) for value in base.values]
    return any(session.get(FolderContentRow, key) for key in keys)


def page_query(tenant: str | None, start: tuple[int, str] | None, limit: int) -> Select[AdapterRow]:
    """At most `limit` adapters of one tenant (None: of all) older than `start`, newest first: one index range."""
    query = select(AdapterRow).where(AdapterRow.is_deleted.is_(False))
    if tenant is not None:
        query = query.where(AdapterRow.tenant == tenant)
    if start is not None:
        query = query.where(tuple_(AdapterRow.created, AdapterRow.id) < tuple_(*start))
    return query.order_by(AdapterRow.created.desc(), AdapterRow.id.desc()).limit(limit)


def page_start(session: Session, tenants: Sequence[str] | None, after: str) -> tuple[int, str]:
    """Where the page after this adapter begins. A deleted one still marks its place. Raises InvalidRequest."""
    row = session.get(AdapterRow, after)
    if row is None or (tenants is not None and row.tenant not in tenants):
        raise InvalidRequest("'after' must be the id of the last adapter of the page before.", param="after")
    return row.created, row.id


def check_kept(session: Session, tenant: str, row: AdapterRow | None, size_bytes: int) -> None:
    """Whether the tenant may keep one more version, under a new name if `row` is None or deleted.

    Raises QuotaExceeded.
    """
    limits = limits_in(session, tenant)
    if limits.max_adapters is not None and (row is None or row.is_deleted):
        count = kept_by(session, tenant).adapters
        if count >= limits.max_adapters:
            raise _exceeded(tenant, f"adapters ({count} of {limits.max_adapters})", "Delete one")
    if limits.max_adapter_bytes is not None:
        kept = kept_by(session, tenant).size_bytes
        if kept + size_bytes > limits.max_adapter_bytes:
            what = f"adapter bytes ({kept} kept and {size_bytes} new, of {limits.max_adapter_bytes})"
            raise _exceeded(tenant, what, "Delete old versions")


def set_card(session: Session, row: AdapterRow, version: VersionRow, wish: Wish) -> bool:
    """Let the version have the card that came, if any did; whether it is another one. Raises QuotaExceeded."""
    if wish.card is None:
        return False
    version.lineage = wish.lineage  # also of a card from before it was read
    if wish.card == version.card:
        return False
    if wish.card_bytes > version.card_bytes:
        check_kept(session, row.tenant, row, wish.card_bytes - version.card_bytes)
    version.card, version.card_bytes = wish.card, wish.card_bytes
    return True


def check_pins(session: Session, tenant: str) -> None:
    """Whether the tenant may pin one more adapter. Raises QuotaExceeded."""
    limits = limits_in(session, tenant)
    if limits.max_pinned is not None:
        count = kept_by(session, tenant).pinned
        if count >= limits.max_pinned:
            raise _exceeded(tenant, f"pinned adapters ({count} of {limits.max_pinned})", "Unpin one")


def kept_by(session: Session, tenant: str) -> KeptRow:
    """The sums of what a tenant keeps; zeros for one that never had an adapter."""
    return session.get(KeptRow, tenant) or KeptRow(tenant=tenant, adapters=0, pinned=0, size_bytes=0)


def count_kept(session: Session, row: AdapterRow, size_bytes: int) -> None:
    """Bring the tenant's sums up to what the adapter is now."""
    kept = kept_by(session, row.tenant)
    now = (0 if row.is_deleted else 1, int(row.pinned), size_bytes)
    kept.adapters += now[0] - row.counted_adapters
    kept.pinned += now[1] - row.counted_pins
    kept.size_bytes += now[2] - row.counted_bytes
    row.counted_adapters, row.counted_pins, row.counted_bytes = now
    session.add(kept)
    session.flush()


def check_counts(session: Session, rows: Sequence[AdapterRow], versions: Mapping[str, Sequence[VersionRow]]) -> None:
    """Assert that the tenants' sums are those of all rows. Reads all rows: for tests."""
    sums: dict[str, list[int]] = {}
    for row in rows:
        size_bytes = sum(version.size_bytes + version.card_bytes for version in versions.get(row.id, ()))
        assert (row.counted_adapters, row.counted_pins) == (not row.is_deleted, row.pinned)
        assert row.counted_bytes == size_bytes
        total = sums.setdefault(row.tenant, [0, 0, 0])
        for index, value in enumerate((not row.is_deleted, row.pinned, size_bytes)):
            total[index] += value
    kept = {
        row.tenant: [row.adapters, row.pinned, row.size_bytes] for row in session.execute(select(KeptRow)).scalars()
    }
    assert kept == sums


def _exceeded(tenant: str, what: str, remedy: str) -> QuotaExceeded:
    return exceeded(tenant, what, f"{remedy}, or ask for a higher quota.", _KEPT_RETRY_S)


def revived_adapter(session: Session, row: AdapterRow | None, tenant: str, name: str) -> AdapterRow:
    """The row to put a new version under: new, or that of a deleted adapter, whose version numbers go on."""
    if row is None:
        row = AdapterRow(
            id=new_id("adapter"),
            tenant=tenant,
            name=name,
            description="",
            active_version=None,
            next_version=1,
            pinned=False,
            is_deleted=False,
            created=now_us(),
        )
        session.add(row)
    elif row.is_deleted:
        row.is_deleted, row.created = False, now_us()
    return row


def add_version(session: Session, row: AdapterRow, new: NewVersion, base: str, defaults: str) -> VersionRow:
    version = VersionRow(
        id=new.id,
        adapter_id=row.id,
        version=row.next_version,
        digest=new.digest,
        blob=new.blob,
        base=base,
        kind=new.kind,
        rank=new.rank,
        alpha=new.alpha,
        target_modules=list(new.target_modules),
        size_bytes=new.size_bytes,
        report=dict(new.report),
        created=now_us(),
        defaults=defaults,
        virtual_tokens=new.virtual_tokens,
        invocation=" ".join(map(str, new.invocation)),
        head=new.head,
        mix=new.mix,
        vocabulary=new.vocabulary,
        card="",
        card_bytes=0,
    )
    row.next_version += 1
    session.flush()  # the adapter's row first: there is no relationship that would order the two
    session.add(version)
    return version


def adopted_version(row: AdapterRow, label: Label) -> VersionRow:
    facts = label.model_dump(exclude={"version_id", "tenant", "name", "switched"})
    facts |= {"target_modules": list(label.target_modules), "card_bytes": len(label.card.encode())}
    return VersionRow(id=label.version_id, adapter_id=row.id, **facts)
