"""Saved mixes within a change to the registry: how one becomes a version, and what its adapters may not lose."""

from collections.abc import Collection, Sequence
from typing import Any, Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from manylora.catalog import queries, saved_mix
from manylora.catalog.base_signature import BaseSignature
from manylora.catalog.records import NewVersion, VersionRecord
from manylora.database.tables import AdapterRow, VersionRow
from manylora.errors import Conflict
from manylora.identity import AdapterRef, Mix

__all__ = ["check_has_files", "check_not_pinned", "check_unused", "has_parts", "new_version", "no_files"]

_KIND: Final = "mix"


def new_version(session: Session, version_id: str, mix: Mix, base: BaseSignature) -> NewVersion:
    """A version that is this mix. Raises Conflict where one of its adapters has been deleted."""
    found = _present(session, [ref.id for ref in mix.refs], base)
    if len(found) < len(mix.refs):
        raise Conflict("An adapter of the mix was deleted meanwhile. Name another one.")
    text = saved_mix.text_of(mix)
    modules = tuple(sorted({module for row in found for module in row.target_modules}))
    report: dict[str, Any] = {"matched": [], "warnings": [], "effect": None}
    return NewVersion(
        id=version_id,
        digest=saved_mix.digest_of(saved_mix.parts_of(text)),
        blob="",
        kind=_KIND,
        rank=sum(row.rank for row in found),
        alpha=0.0,
        target_modules=modules,
        size_bytes=len(text.encode()),
        report=report,
        mix=text,
    )


def has_parts(session: Session, version: VersionRow, base: BaseSignature) -> bool:
    """Whether each adapter of a mix is still there and made for this base; so it is for what is not a mix."""
    ids = [part.id for part in saved_mix.parts_of(version.mix)]
    return len(_present(session, ids, base)) == len(ids)


def _present(session: Session, ids: Sequence[str], base: BaseSignature) -> list[VersionRow]:
    rows = [session.get(VersionRow, version_id) for version_id in ids]
    return [row for row in rows if row is not None and base.fits(row.base)]


def check_unused(session: Session, tenant: str, label: str, ids: Collection[str]) -> None:
    """Raises Conflict where a saved mix of the tenant, other than these versions, has one of them."""
    query = (
        select(AdapterRow.name, VersionRow.version, VersionRow.id, VersionRow.mix)
        .join(VersionRow, VersionRow.adapter_id == AdapterRow.id)
        .where(AdapterRow.tenant == tenant, VersionRow.mix != "")
    )
    users = [
        f"{row.name}@{row.version}"
        for row in session.execute(query.order_by(AdapterRow.name, VersionRow.version))
        if row.id not in ids and any(part.id in ids for part in saved_mix.parts_of(row.mix))
    ]
    if users:
        more = " and others" if len(users) > 3 else ""
        raise Conflict(f"'{label}' is part of the mix {', '.join(users[:3])}{more}. Delete that first.")


def check_not_pinned(session: Session, row: AdapterRow) -> None:
    """A mix has nothing of its own to be kept on the device. Raises Conflict where a pinned adapter would be one."""
    active = queries.find_version(session, row, row.active_version) if row.pinned else None
    if active is not None and active.mix:
        raise Conflict(f"'{row.name}@{active.version}' is a mix, which is not pinned. Pin its adapters.")


def check_has_files(version: VersionRecord) -> None:
    """Raises Conflict for a mix."""
    if version.mix:
        raise no_files(version.ref)


def no_files(ref: AdapterRef) -> Conflict:
    """The one answer to whoever wants the files of a mix."""
    return Conflict(f"{ref.label} is a mix, which has no files. Its adapters have.")
