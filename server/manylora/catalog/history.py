"""Who changed what of an adapter, and when: rows that are written in the transaction of the change itself.

The changes that made a version active form a list for each adapter, by `before`, so that a rollback finds the version
that was active before in one step, and a second rollback goes back one further.
"""

from collections.abc import Sequence
from typing import Final

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from manylora.catalog import queries
from manylora.catalog.base_signature import BaseSignature
from manylora.catalog.records import Change, ChangePage
from manylora.database.changes import ADAPTER_CHANGE, add_change
from manylora.database.tables import AdapterRow, ChangeRow, VersionRow
from manylora.errors import Conflict
from manylora.identity import Author

_LOOK_BACK: Final = 1000  # changes


def note(
    session: Session,
    row: AdapterRow,
    author: Author,
    action: str,
    *,
    was: int | None,
    version: int | None = None,
    fields: Sequence[str] = (),
    before: int | None = None,
) -> None:
    """Note a change to the adapter, whose active version was `was` before it.

    `before` is given for a rollback: the change that a next one goes back to. Else that is the last one before this.
    """
    is_switch = row.active_version != was
    if is_switch and was is not None and before is None and action != "rollback":
        last = _last_switch(session, row)
        before = None if last is None else last.id
    add_change(
        session, author, ADAPTER_CHANGE, row.tenant, row.name, action, version=version, before=before, fields=fields,
        switch=(was, row.active_version) if is_switch else (None, None),
    )  # fmt: skip


def expected(row: AdapterRow, active_version: int | None) -> AdapterRow:
    """The row. Raises Conflict where another version is active than somebody believes; None believes nothing."""
    if active_version not in (None, row.active_version):
        now = "none" if row.active_version is None else f"'{row.name}@{row.active_version}'"
        raise Conflict(
            f"'{row.name}@{active_version}' is not the active version any more, but {now}. "
            f"GET /v1/adapters/{row.name}/history says who changed that; decide again."
        )
    return row


def earlier(session: Session, row: AdapterRow, base: BaseSignature) -> tuple[VersionRow, int | None]:
    """The version that was active before the present one and can be again; and what comes before that.

    Raises Conflict where nothing is known of such a version.
    """
    change = _last_switch(session, row)
    for _ in range(_LOOK_BACK):
        if change is None:
            break
        version = queries.find_version(session, row, change.to_version)
        if version is not None and base.fits(version.base) and version.version != row.active_version:
            return version, change.before
        change = None if change.before is None else session.get(ChangeRow, change.before)
    raise Conflict(
        f"No version of '{row.name}' that is still there was active before the present one. "
        "Its history shows what was; promote a version by its number."
    )


def of_adapter(session: Session, row: AdapterRow, limit: int, before: int | None) -> ChangePage:
    """The adapter's newest `limit` changes before the change `before`, newest first: one index range."""
    query = select(ChangeRow).where(
        ChangeRow.kind == ADAPTER_CHANGE, ChangeRow.tenant == row.tenant, ChangeRow.name == row.name
    )
    return _page(session, query, limit, before)


def of_tenants(session: Session, tenant: str | None, limit: int, before: int | None) -> ChangePage:
    """The newest changes to all that is one tenant's, None: to everything; as `of_adapter`."""
    query = select(ChangeRow)
    return _page(session, query if tenant is None else query.where(ChangeRow.tenant == tenant), limit, before)


def check(session: Session, rows: Sequence[AdapterRow]) -> None:
    """Assert that each adapter's changes end with what is active now. Reads them one by one: for tests."""
    for row in rows:
        query = select(ChangeRow).where(
            ChangeRow.kind == ADAPTER_CHANGE,
            ChangeRow.tenant == row.tenant,
            ChangeRow.name == row.name,
            ChangeRow.from_version.is_not(None) | ChangeRow.to_version.is_not(None),
        )
        last = session.execute(query.order_by(ChangeRow.id.desc()).limit(1)).scalar_one_or_none()
        assert row.active_version == (None if last is None else last.to_version)


def _page(session: Session, query: Select[ChangeRow], limit: int, before: int | None) -> ChangePage:
    if before is not None:
        query = query.where(ChangeRow.id < before)
    found = session.execute(query.order_by(ChangeRow.id.desc()).limit(limit + 1)).scalars().all()
    next_before = found[limit - 1].id if len(found) > limit else None
    return ChangePage(tuple(map(_change, found[:limit])), next_before)


def _change(row: ChangeRow) -> Change:
    return Change(
        id=row.id,
        at=row.at,
        kind=row.kind,
        tenant=row.tenant,
        name=row.name,
        action=row.action,
        version=row.version,
        from_version=row.from_version,
        to_version=row.to_version,
        fields=tuple(row.fields),
        author=Author(row.by_tenant, row.by_role, row.by_key, row.note),
    )


def _last_switch(session: Session, row: AdapterRow) -> ChangeRow | None:
    """The last change that made a version of the adapter active."""
    query = select(ChangeRow).where(
        ChangeRow.kind == ADAPTER_CHANGE,
        ChangeRow.tenant == row.tenant,
        ChangeRow.name == row.name,
        ChangeRow.to_version.is_not(None),
    )
    return session.execute(query.order_by(ChangeRow.id.desc()).limit(1)).scalar_one_or_none()
