"""Usage summed up: one row for each tenant, adapter and day, or for fewer of the three."""

import base64
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

import orjson
from sqlalchemy import BigInteger, Select, func, literal_column, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from manylora.database.database import Database
from manylora.database.tables import MICROSECONDS, SlotTimeRow, StoredRow, TrainingUsageRow, UsageRow
from manylora.errors import InvalidRequest
from manylora.usage.period import DAY_S, Period, as_rfc3339

__all__ = ["DEFAULT_GROUPS", "GROUPS", "Group", "UsageLine", "UsageReport", "make_report", "parse_groups"]

Group = Literal["tenant", "adapter", "day"]
GROUPS: Final[tuple[Group, ...]] = get_args(Group)
DEFAULT_GROUPS: Final[tuple[Group, ...]] = ("tenant", "adapter")
_DAY_US: Final = DAY_S * MICROSECONDS
# Not a parameter: PostgreSQL takes an expression with one for another than the same in GROUP BY.
_DAY: Final = literal_column(str(DAY_S), BigInteger)
_HOUR_US: Final = 3600 * MICROSECONDS
_LONGEST_ECHO: Final = 40

# What tells rows apart: tenant, owner, adapter, number of the day. Those that are not grouped by are None.
_Key = tuple[str | None, str | None, str | None, int | None]
# Where a row stands: day, tenant, adapter, owner.
_Place = tuple[int, str, str, str]


@dataclass(slots=True)
class UsageLine:
    """Sums. `byte_us` is bytes times microseconds; `stored_bytes` is what was stored at the end of the time."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    slot_us: int = 0
    stored_bytes: int = 0
    byte_us: int = 0
    training_tokens: int = 0
    training_us: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The line as `GET /v1/usage` shows it."""
        return {
            "requests": self.requests,
            "outcomes": self.outcomes,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cached_tokens": self.cached_tokens,
            "slot_seconds": self.slot_us / MICROSECONDS,
            "stored_bytes": self.stored_bytes,
            "stored_byte_hours": round(self.byte_us / _HOUR_US, 3),
            "training_tokens": self.training_tokens,
            "training_seconds": self.training_us / MICROSECONDS,
        }


@dataclass(frozen=True, slots=True)
class UsageReport:
    """Rows of one page in order of day, tenant and adapter, and the sum of all rows of all pages.

    `last_id` is what asks for the page after this one; None where there are no rows.
    """

    period: Period
    groups: tuple[Group, ...]
    lines: list[tuple[dict[str, Any], UsageLine]]
    total: UsageLine
    last_id: str | None = None
    has_more: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The answer of `GET /v1/usage`."""
        return {
            "object": "usage",
            "from": as_rfc3339(self.period.start_s),
            "to": as_rfc3339(self.period.end_s),
            "group_by": self.groups,
            "data": [{**names, **line.as_dict()} for names, line in self.lines],
            "total": self.total.as_dict(),
            "last_id": self.last_id,
            "has_more": self.has_more,
        }


def parse_groups(text: str | None) -> tuple[Group, ...]:
    """The columns named in `group_by`; absent and empty are the default. Raises InvalidRequest."""
    if not text:
        return DEFAULT_GROUPS
    wanted = [part.strip() for part in text.split(",")]
    for part in wanted:
        if part not in GROUPS:
            shown = part[:_LONGEST_ECHO]
            raise InvalidRequest(f"'group_by' takes {', '.join(GROUPS)}, not {shown!r}.", param="group_by")
    if len(set(wanted)) < len(wanted):
        raise InvalidRequest("'group_by' names something twice.", param="group_by")
    return tuple(group for group in GROUPS if group in wanted)


def make_report(
    database: Database,
    period: Period,
    groups: tuple[Group, ...],
    *,
    tenant: str | None,
    now_us: int,
    limit: int | None = None,
    after: str | None = None,
) -> UsageReport:
    """Usage of `tenant` in a period, with None of all tenants: at most `limit` rows after `after`, or all. Blocks.

    Raises InvalidRequest for an `after` that no page has given.
    """
    start = None if after is None else _read_id(after)
    sums = _Sums(groups)
    with database.read(is_long=True) as session:
        _add_requests(session, sums, period, tenant)
        _add_slot_time(session, sums, period, tenant)
        _add_stored(session, sums, period, tenant, now_us)
        _add_training(session, sums, period, tenant)
    rest = sorted((item for item in sums.lines.items() if start is None or _order(item) > start), key=_order)
    page = rest[:limit]
    lines = [(_names(groups, key), line) for key, line in page]
    last_id = _write_id(_order(page[-1])) if page else None
    return UsageReport(period, groups, lines, sums.total, last_id, len(rest) > len(page))


class _Sums:
    """Lines by key, and their total."""

    def __init__(self, groups: tuple[Group, ...]) -> None:
        self.lines: dict[_Key, UsageLine] = {}
        self.total = UsageLine()
        self.by_tenant, self.by_adapter, self.by_day = (group in groups for group in GROUPS)

    def both(self, tenant: str, owner: str, adapter: str, day: int) -> tuple[UsageLine, UsageLine]:
        """The line that these names belong to, and the total."""
        key: _Key = (
            tenant if self.by_tenant else None,
            owner if self.by_adapter else None,
            adapter if self.by_adapter else None,
            day if self.by_day else None,
        )
        return self.lines.setdefault(key, UsageLine()), self.total


def _order(item: tuple[_Key, UsageLine]) -> _Place:
    (tenant, owner, adapter, day), _ = item
    return day or 0, tenant or "", adapter or "", owner or ""


def _write_id(place: _Place) -> str:
    return base64.urlsafe_b64encode(orjson.dumps(place)).decode()


def _read_id(text: str) -> _Place:
    """The place that `_write_id` wrote. Raises InvalidRequest."""
    try:
        day, tenant, adapter, owner = orjson.loads(base64.urlsafe_b64decode(text.encode()))
    except (ValueError, TypeError):
        day = None
    if not isinstance(day, int) or not all(isinstance(name, str) for name in (tenant, adapter, owner)):
        message = "'after' must be the 'last_id' of the page before. Leave it out for the first page."
        raise InvalidRequest(message, param="after")
    return day, tenant, adapter, owner


def _names(groups: tuple[Group, ...], key: _Key) -> dict[str, Any]:
    tenant, owner, adapter, day = key
    names: dict[str, Any] = {}
    if day is not None:
        names["day"] = (as_rfc3339(day * DAY_S) or "")[:10]
    if "tenant" in groups:
        names["tenant"] = tenant
    if "adapter" in groups:
        names |= {"adapter": adapter or None, "adapter_tenant": owner or None}
    return names


def _within(query: Select[Any], quarter: InstrumentedAttribute[int], period: Period) -> Select[Any]:
    if period.start_s is not None:
        query = query.where(quarter >= period.start_s)
    return query if period.end_s is None else query.where(quarter < period.end_s)


def _add_requests(session: Session, sums: _Sums, period: Period, tenant: str | None) -> None:
    row = UsageRow
    keys: Sequence[Any] = (row.tenant, row.owner, row.adapter, row.quarter // _DAY, row.outcome)
    counts = (row.requests, row.prompt_tokens, row.completion_tokens, row.cached_tokens)
    query = _within(select(*keys, *map(func.sum, counts)).group_by(*keys), row.quarter, period)
    if tenant is not None:
        query = query.where(row.tenant == tenant)
    for caller, owner, adapter, number, outcome, *summed in session.execute(query.order_by(*keys)):
        requests, prompt, completion, cached = map(int, summed)
        for line in sums.both(caller, owner, adapter, number):
            line.requests += requests
            line.prompt_tokens += prompt
            line.completion_tokens += completion
            line.cached_tokens += cached
            if requests:  # an upload's probe is tokens and no request
                line.outcomes[outcome] = line.outcomes.get(outcome, 0) + requests


def _add_slot_time(session: Session, sums: _Sums, period: Period, tenant: str | None) -> None:
    row = SlotTimeRow
    keys: Sequence[Any] = (row.tenant, row.adapter, row.quarter // _DAY)
    query = _within(select(*keys, func.sum(row.microseconds)).group_by(*keys), row.quarter, period)
    if tenant is not None:
        query = query.where(row.tenant == tenant)
    for owner, adapter, number, microseconds in session.execute(query):
        for line in sums.both(owner, owner, adapter, number):
            line.slot_us += int(microseconds)


def _add_training(session: Session, sums: _Sums, period: Period, tenant: str | None) -> None:
    row = TrainingUsageRow
    keys: Sequence[Any] = (row.tenant, row.adapter, row.quarter // _DAY)
    summed = (func.sum(row.tokens), func.sum(row.microseconds))
    query = _within(select(*keys, *summed).group_by(*keys), row.quarter, period)
    if tenant is not None:
        query = query.where(row.tenant == tenant)
    for owner, adapter, number, tokens, microseconds in session.execute(query):
        for line in sums.both(owner, owner, adapter, number):
            line.training_tokens += int(tokens)
            line.training_us += int(microseconds)


def _add_stored(session: Session, sums: _Sums, period: Period, tenant: str | None, now_us: int) -> None:
    end_us = now_us if period.end_s is None else min(now_us, period.end_s * MICROSECONDS)
    query = select(StoredRow).where(StoredRow.at < end_us).order_by(StoredRow.tenant, StoredRow.adapter, StoredRow.id)
    if tenant is not None:
        query = query.where(StoredRow.tenant == tenant)
    for span in _spans(session.execute(query).scalars(), end_us):
        start_us = max(span.start_us, 0 if period.start_s is None else period.start_s * MICROSECONDS)
        while start_us < span.end_us:
            day = start_us // _DAY_US
            line_end_us = min(end_us, (day + 1) * _DAY_US) if sums.by_day else end_us
            cut = min(span.end_us, line_end_us)
            line, total = sums.both(span.tenant, span.tenant, span.adapter, day)
            line.byte_us += span.size_bytes * (cut - start_us)
            total.byte_us += span.size_bytes * (cut - start_us)
            if cut == line_end_us:
                line.stored_bytes += span.size_bytes
            if cut == end_us:
                total.stored_bytes += span.size_bytes
            start_us = cut


@dataclass(frozen=True, slots=True)
class _Span:
    """One adapter kept `size_bytes` (more than none) for this time."""

    tenant: str
    adapter: str
    start_us: int
    end_us: int
    size_bytes: int


def _spans(changes: Iterable[StoredRow], end_us: int) -> Iterator[_Span]:
    """Spans between changes, given in order of adapter and time. A clock set back counts as one that stood still."""
    before: StoredRow | None = None
    at = 0
    for change in changes:
        is_same = before is not None and (before.tenant, before.adapter) == (change.tenant, change.adapter)
        until = max(at, change.at) if is_same else end_us
        if before is not None and before.size_bytes and at < until:
            yield _Span(before.tenant, before.adapter, at, until, before.size_bytes)
        before, at = change, until if is_same else change.at
    if before is not None and before.size_bytes and at < end_us:
        yield _Span(before.tenant, before.adapter, at, end_us, before.size_bytes)
