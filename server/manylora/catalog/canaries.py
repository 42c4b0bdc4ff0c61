"""Canaries within a change to the registry: a version that answers a share of its adapter's requests, and its end.

Who is answered by which version is decided in memory (`Directory.drawn`); what came of it is counted with usage
(`usage.store`), so that it is exact across servers and kills.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from manylora.catalog import mixes, queries
from manylora.catalog.base_signature import BaseSignature
from manylora.catalog.records import new_id, now_us
from manylora.database.changes import ADAPTER_CHANGE, add_change
from manylora.database.tables import AdapterRow, CanaryCountRow, CanaryRow
from manylora.errors import Conflict, NotFound
from manylora.identity import Author

__all__ = ["Arm", "CanaryRecord", "Reason", "begin", "check", "end", "last", "settle", "verdict", "worse"]

Reason = Literal["promoted", "replaced", "deleted", "stopped", "time", "worse"]
# Looked at again and again while it runs, so that one look has to be surer than a single test would.
_SURE: Final = 1e-4
_FAILED: Final = "error"
_JUDGED: Final = ("ok", _FAILED)  # what a client's mistake, its leaving or a quota ended says nothing of a version


@dataclass(slots=True)
class Arm:
    """What the requests came to that one version answered; times are seconds, None before the first token."""

    version: int
    outcomes: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    first_tokens: int = 0
    ttft_us: int = 0

    @property
    def requests(self) -> int:
        return sum(self.outcomes.values())

    @property
    def mean_ttft_s(self) -> float | None:
        return self.ttft_us / self.first_tokens / 1e6 if self.first_tokens else None

    @property
    def failed(self) -> int:
        """Requests that the server failed."""
        return self.outcomes.get(_FAILED, 0)

    @property
    def judged(self) -> int:
        """Requests that were answered or failed by the server."""
        return sum(self.outcomes.get(outcome, 0) for outcome in _JUDGED)


@dataclass(frozen=True, slots=True)
class CanaryRecord:
    """One canary with its counts so far: of the version that is tried, and of the active one beside it.

    Times are Unix microseconds. `p_value` is the chance of as many failures of the tried version, were it no worse.
    """

    id: str
    tenant: str
    name: str
    share: float
    until: int | None
    created: int
    ended: int | None
    reason: str
    tried: Arm
    beside: Arm

    @property
    def said(self) -> str:
        """How often either failed."""
        tried, beside = self.tried, self.beside
        return f"{tried.failed} of {tried.judged} requests failed, and {beside.failed} of {beside.judged} beside it"

    @property
    def p_value(self) -> float:
        return worse(self.tried.failed, self.tried.judged, self.beside.failed, self.beside.judged)


def begin(
    session: Session,
    row: AdapterRow,
    number: int,
    base: BaseSignature,
    *,
    share: float,
    until: int | None,
    author: Author,
) -> None:
    """Let the version answer this share of the requests for the adapter's bare name from now on.

    The same version again has another share and end from now on, and keeps whom it answers, and its counts. Raises
    AdapterNotFound, or Conflict for a version that cannot be tried beside the active one.
    """
    version = queries.get_version(session, row, number)
    label = f"{row.name}@{number}"
    if row.active_version is None:
        raise Conflict(f"'{row.name}' has no active version that '{label}' could be tried beside. Promote one.")
    if row.active_version == number:
        raise Conflict(f"'{label}' is the active version already. Try another one.")
    if not base.fits(version.base):
        raise Conflict(f"'{label}' was made for a base of other shapes than the one that is served here.")
    if not mixes.has_parts(session, version, base):
        raise Conflict(f"'{label}' is a mix that lacks an adapter, so it answers nobody.")
    running = _running(session, row)
    if running is not None and running.version != number:
        end(session, row, "replaced", author)
        running = None
    if running is None:
        row.canary = new_id("canary")
        found = {"version": number, "beside": row.active_version, "share": share, "until": until}
        session.add(CanaryRow(id=row.canary, adapter_id=row.id, created=now_us(), ended=None, reason="", **found))
    else:
        running.share, running.until = share, until
    add_change(session, author, ADAPTER_CHANGE, row.tenant, row.name, "canary", version=number, fields=["share"])


def end(session: Session, row: AdapterRow, reason: Reason, author: Author) -> None:
    """End the adapter's canary. Raises NotFound where none runs."""
    running = _running(session, row)
    if running is None:
        raise NotFound(f"No version of '{row.name}' is tried on a share of its requests now.")
    _end(row, running, reason)
    add_change(
        session, author, ADAPTER_CHANGE, row.tenant, row.name, "canary_end", version=running.version, fields=["share"]
    )


def settle(session: Session, row: AdapterRow) -> None:
    """Within any change to an adapter: end a canary whose version, or the one beside it, is not what it was.

    The change that does so is in the history by itself.
    """
    running = _running(session, row)
    if running is None:
        return
    if row.active_version == running.version:
        _end(row, running, "promoted")
    elif row.is_deleted or queries.find_version(session, row, running.version) is None:
        _end(row, running, "deleted")
    elif row.active_version != running.beside:
        _end(row, running, "replaced")


def verdict(session: Session, row: AdapterRow, seen: str) -> tuple[CanaryRecord, Reason] | None:
    """Why the canary `seen` is to end now; None where it goes on, or has ended."""
    running = _running(session, row)
    if running is None or running.id != seen:
        return None
    record = _record(session, row, running)
    if record.p_value < _SURE:
        return record, "worse"
    return (record, "time") if running.until is not None and running.until <= now_us() else None


def last(session: Session, row: AdapterRow) -> CanaryRecord:
    """The adapter's canary that runs, or the one before. Raises NotFound where there was none."""
    query = select(CanaryRow).where(CanaryRow.adapter_id == row.id)
    found = session.execute(query.order_by(CanaryRow.created.desc(), CanaryRow.id).limit(1)).scalar_one_or_none()
    if found is None:
        raise NotFound(f"No version of '{row.name}' was tried on a share of its requests yet.")
    return _record(session, row, found)


def check(session: Session, rows: Sequence[AdapterRow]) -> None:
    """Assert that what runs is what the adapters name, beside what is active. Reads all of them: for tests."""
    query = select(CanaryRow).where(CanaryRow.ended.is_(None))
    running = {found.id: found for found in session.execute(query).scalars()}
    named = {row.canary: row for row in rows if row.canary}
    assert running.keys() == named.keys()
    for found in running.values():
        row = named[found.id]
        assert (found.adapter_id, found.beside) == (row.id, row.active_version)
        assert queries.find_version(session, row, found.version) is not None
        assert found.version != found.beside


def worse(failed: int, total: int, other_failed: int, other_total: int) -> float:
    """The chance of at least so many failures among the first, if both fail equally often (Fisher's exact test)."""
    if not failed or failed * other_total <= other_failed * total:
        return 1.0
    all_failed, everything = failed + other_failed, total + other_total
    term = math.exp(
        _log_choose(total, failed) + _log_choose(other_total, other_failed) - _log_choose(everything, all_failed)
    )
    found = term
    for k in range(failed, min(total, all_failed)):
        term *= (total - k) * (all_failed - k) / ((k + 1) * (other_total - all_failed + k + 1))
        found += term
        if term <= found * 1e-12:  # each is smaller than the one before by a factor that only falls
            break
    return min(1.0, found)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _running(session: Session, row: AdapterRow) -> CanaryRow | None:
    return session.get(CanaryRow, row.canary) if row.canary else None


def _end(row: AdapterRow, running: CanaryRow, reason: Reason) -> None:
    running.ended, running.reason, row.canary = now_us(), reason, ""


def _record(session: Session, row: AdapterRow, found: CanaryRow) -> CanaryRecord:
    arms: Mapping[int, Arm] = {number: Arm(number) for number in (found.version, found.beside)}
    query = select(CanaryCountRow).where(CanaryCountRow.canary == found.id)
    for counts in session.execute(query.order_by(CanaryCountRow.outcome)).scalars():
        arm = arms[counts.version]
        arm.outcomes[counts.outcome] = counts.requests
        for name in ("prompt_tokens", "completion_tokens", "cached_tokens", "first_tokens", "ttft_us"):
            setattr(arm, name, getattr(arm, name) + getattr(counts, name))
    facts = {name: getattr(found, name) for name in ("id", "share", "until", "created", "ended", "reason")}
    return CanaryRecord(tenant=row.tenant, name=row.name, tried=arms[found.version], beside=arms[found.beside], **facts)
