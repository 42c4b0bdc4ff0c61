"""Usage summed up: one row for each tenant, adapter and day or hour, or for fewer of the three."""

import base64
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

import orjson
from sqlalchemy import BigInteger, ColumnElement, Select, func, literal_column, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from manylora.database.database import Database
from manylora.database.tables import MICROSECONDS, SlotTimeRow, StoredRow, TrainingUsageRow, UsageRow
from manylora.errors import InvalidRequest
from manylora.usage.period import DAY_S, Period, as_rfc3339
from manylora.usage.prices import Prices

__all__ = ["DEFAULT_GROUPS", "GROUPS", "Group", "UsageLine", "UsageReport", "make_report", "parse_groups"]

Group = Literal["tenant", "adapter", "day", "hour"]
GROUPS: Final[tuple[Group, ...]] = get_args(Group)
DEFAULT_GROUPS: Final[tuple[Group, ...]] = ("tenant", "adapter")
MAX_HOURS: Final = 31 * 24  # that may be told apart at once: what is stored is cut at each of them
_HOUR_S: Final = 3600
_HOUR_US: Final = 3600 * MICROSECONDS
_LONGEST_ECHO: Final = 40

# What tells rows apart: tenant, owner, adapter, number of the day or hour. Those that are not grouped by are None.
_Key = tuple[str | None, str | None, str | None, int | None]
# Where a row stands: day or hour, tenant, adapter, owner.
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

    def as_dict(self, prices: Prices | None = None) -> dict[str, Any]:
        """The line as `GET /v1/usage` shows it, with what it costs where there are prices."""
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
            **({} if prices is None else {"cost": prices.cost(self)}),
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

    def as_dict(self, prices: Prices | None = None) -> dict[str, Any]:
        """The answer of `GET /v1/usage`."""
        return {
            "object": "usage",
            "from": as_rfc3339(self.period.start_s),
            "to": as_rfc3339(self.period.end_s),
            "group_by": self.groups,
            "data": [{**names, **line.as_dict(prices)} for names, line in self.lines],
            "total": self.total.as_dict(prices),
            "prices": None if prices is None else prices.as_dict(),
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
    if "day" in wanted and "hour" in wanted:
        raise InvalidRequest("'group_by' takes days or hours, not both.", param="group_by")
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

    Raises InvalidRequest for an `after` that no page has given, and for more hours than `MAX_HOURS`.
    """
    if "hour" in groups:
        _check_hours(period, now_us)
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


def _check_hours(period: Period, now_us: int) -> None:
    end_s = now_us // MICROSECONDS if period.end_s is None else period.end_s
    if period.start_s is None or end_s - period.start_s > MAX_HOURS * _HOUR_S:
        raise InvalidRequest(
            f"Hours are told for {MAX_HOURS // 24} days at most: send 'from', no longer than that before 'to' or now.",
            param="from",
        )


class _Sums:
    """Lines by key, and their total. `unit_s`: how long is what times fall into, a day or an hour."""

    def __init__(self, groups: tuple[Group, ...]) -> None:
        self.lines: dict[_Key, UsageLine] = {}
        self.total = UsageLine()
        self.by_tenant, self.by_adapter = "tenant" in groups, "adapter" in groups
        self.by_time = "day" in groups or "hour" in groups
        self.unit_s = _HOUR_S if "hour" in groups else DAY_S

    @property
    def unit(self) -> ColumnElement[int]:
        """Not a parameter: PostgreSQL takes an expression with one for another than the same in GROUP BY."""
        return literal_column(str(self.unit_s), BigInteger)

    def both(self, tenant: str, owner: str, adapter: str, number: int) -> tuple[UsageLine, UsageLine]:
        """The line that these names belong to, and the total."""
        key: _Key = (
            tenant if self.by_tenant else None,
            owner if self.by_adapter else None,
            adapter if self.by_adapter else None,
            number if self.by_time else None,
        )
        return self.lines.setdefault(key, UsageLine()), self.total


def _order(item: tuple[_Key, UsageLine]) -> _Place:
    (tenant, owner, adapter, number), _ = item
    return number or 0, tenant or "", adapter or "", owner or ""


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
    tenant, owner, adapter, number = key
    names: dict[str, Any] = {}
    if number is not None and "hour" in groups:
        names["hour"] = as_rfc3339(number * _HOUR_S)
    elif number is not None:
        names["day"] = (as_rfc3339(number * DAY_S) or "")[:10]
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
    keys: Sequence[Any] = (row.tenant, row.owner, row.adapter, row.quarter // sums.unit, row.outcome)
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
    keys: Sequence[Any] = (row.tenant, row.adapter, row.quarter // sums.unit)
    query = _within(select(*keys, func.sum(row.microseconds)).group_by(*keys), row.quarter, period)
    if tenant is not None:
        query = query.where(row.tenant == tenant)
    for owner, adapter, number, microseconds in session.execute(query):
        for line in sums.both(owner, owner, adapter, number):
            line.slot_us += int(microseconds)


def _add_training(session: Session, sums: _Sums, period: Period, tenant: str | None) -> None:
    row = TrainingUsageRow
    keys: Sequence[Any] = (row.tenant, row.adapter, row.quarter // sums.unit)
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
    unit_us = sums.unit_s * MICROSECONDS
    for span in _spans(session.execute(query).scalars(), end_us):
        start_us = max(span.start_us, 0 if period.start_s is None else period.start_s * MICROSECONDS)
        while start_us < span.end_us:
            number = start_us // unit_us
            line_end_us = min(end_us, (number + 1) * unit_us) if sums.by_time else end_us
            cut = min(span.end_us, line_end_us)
            line, total = sums.both(span.tenant, span.tenant, span.adapter, number)
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
