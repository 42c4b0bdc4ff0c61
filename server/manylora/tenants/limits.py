"""A tenant's fair share and quotas, as the operator sets them, and what is said to one that has used one up."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Final

from sqlalchemy import func, select, union
from sqlalchemy.orm import Session

from manylora.database.changes import add_change
from manylora.database.database import Database, revision_in
from manylora.database.tables import KeptRow, KeyRow, TenantRow
from manylora.errors import InvalidRequest, NotFound, QuotaExceeded, quoted
from manylora.identity import OPERATOR, Author
from manylora.tenants.keys import check_tenant

_MAX_WEIGHT: Final = 1000.0
_MAX_LIMIT: Final = 2**62


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """None is "no limit". A limit of 0 allows nothing. `weight` is the share in the scheduler."""

    weight: float = 1.0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    max_adapters: int | None = None
    max_adapter_bytes: int | None = None
    max_pinned: int | None = None
    max_file_bytes: int | None = None
    max_jobs_queued: int | None = None
    max_jobs_running: int | None = None
    training_tokens_per_day: int | None = None


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant with what it may use, and what it keeps now: adapters, pinned ones, bytes; and its keys that hold."""

    name: str
    limits: TenantLimits
    adapters: int
    pinned: int
    adapter_bytes: int
    keys: int


LIMIT_NAMES: Final = tuple(f.name for f in fields(TenantLimits) if f.name != "weight")


def limits_in(session: Session, tenant: str) -> TenantLimits:
    """The tenant's as they are in this session: the defaults for one without a row."""
    row = session.get(TenantRow, tenant)
    return TenantLimits() if row is None else _limits(row)


def exceeded(tenant: str, what: str, remedy: str, retry_after_s: float) -> QuotaExceeded:
    """The refusal of a tenant that has used up its quota of `what`; `remedy` is a sentence."""
    message = f"The tenant '{tenant}' has used up its quota of {what}. {remedy}"
    return QuotaExceeded(message, retry_after_s=retry_after_s)


class TenantStore:
    """The tenants' rows. Methods block."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def changed(self, since: int) -> tuple[dict[str, TenantLimits], int]:
        """The tenants that were set after revision `since`, and the last of these; with -1 all that have a row."""
        with self._database.read(is_long=True) as session:
            rows = session.execute(select(TenantRow).where(TenantRow.revision > since)).scalars().all()
            return {row.name: _limits(row) for row in rows}, max((row.revision for row in rows), default=-1)

    def list(self) -> dict[str, TenantLimits]:
        """Every tenant with a row; the others have the defaults."""
        with self._database.read() as session:
            rows = session.execute(select(TenantRow).order_by(TenantRow.name)).scalars().all()
            return {row.name: _limits(row) for row in rows}

    def page(self, limit: int, after: str) -> tuple[Sequence[Tenant], bool]:
        """At most `limit` tenants by name, behind `after`, and whether there are more.

        Tenants are those that have a row, a key, or had an adapter.
        """
        names = union(select(TenantRow.name), select(KeyRow.tenant), select(KeptRow.tenant)).subquery()
        query = select(names.c.name).where(names.c.name > after).order_by(names.c.name).limit(limit + 1)
        with self._database.read() as session:
            found = session.execute(query).scalars().all()
            return [_tenant(session, name) for name in found[:limit]], len(found) > limit

    def get(self, tenant: str) -> Tenant:
        """One of those that `page` lists. Raises NotFound."""
        with self._database.read() as session:
            is_known = (
                session.get(TenantRow, tenant) is not None
                or session.get(KeptRow, tenant) is not None
                or session.execute(select(KeyRow.id).where(KeyRow.tenant == tenant).limit(1)).first() is not None
            )
            if not is_known:
                raise NotFound(f"There is no tenant '{quoted(tenant)}'. GET /v1/tenants lists them.")
            return _tenant(session, tenant)

    def change(self, tenant: str, author: Author = OPERATOR, /, **values: float | int | None) -> TenantLimits:
        """Set the named fields of TenantLimits and leave the others. Raises InvalidRequest."""
        check_tenant(tenant)
        with self._database.write("tenants") as session:
            before = limits_in(session, tenant)
            limits = replace(before, **values)  # type: ignore[arg-type]
            _check(limits)
            changed = [name for name in sorted(values) if getattr(limits, name) != getattr(before, name)]
            if changed:
                add_change(session, author, "tenant", tenant, tenant, "change", fields=changed)
            session.merge(TenantRow(name=tenant, revision=revision_in(session, "tenants"), **asdict(limits)))
        return limits


def _limits(row: TenantRow) -> TenantLimits:
    return TenantLimits(**{f.name: getattr(row, f.name) for f in fields(TenantLimits)})


def _tenant(session: Session, name: str) -> Tenant:
    kept = session.get(KeptRow, name)
    now = time.time_ns() // 1000
    holding = select(func.count()).where(
        KeyRow.tenant == name, KeyRow.revoked.is_(None), KeyRow.expires.is_(None) | (KeyRow.expires > now)
    )
    num_keys = session.execute(holding).scalar_one()
    sums = (0, 0, 0) if kept is None else (kept.adapters, kept.pinned, kept.size_bytes)
    return Tenant(name, limits_in(session, name), *sums, num_keys)


def _check(limits: TenantLimits) -> None:
    if not 0 < limits.weight <= _MAX_WEIGHT:
        raise InvalidRequest(f"The weight must be above 0 and at most {_MAX_WEIGHT:g}.", param="weight")
    for name in LIMIT_NAMES:
        value = getattr(limits, name)
        if value is not None and not 0 <= value <= _MAX_LIMIT:
            raise InvalidRequest(f"{name} must be 0 or more.", param=name)
