"""Spans of time that usage can be asked for: whole quarters of an hour, in UTC.

A quarter of an hour is the coarsest grain in which every time zone's midnight falls on a boundary, so that a bill can
follow anybody's calendar and no request is ever counted on both sides of a cut.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from manylora.errors import InvalidRequest, quoted

__all__ = ["DAY_S", "QUARTER_S", "Period", "as_rfc3339", "parse_period", "quarter_of"]

QUARTER_S: Final = 900
DAY_S: Final = 86_400
# `+` in a query string that nobody encoded arrives as a space.
_TIME: Final = re.compile(r"(\d{4}-\d\d-\d\d)(?:[Tt ](\d\d:\d\d:\d\d(?:\.\d{1,9})?)([Zz]|[+\- ]\d\d:\d\d))?", re.ASCII)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
# What can be written back in UTC; with an offset, a time can be read that cannot.
_FIRST: Final = datetime(1, 1, 1, tzinfo=UTC) - _EPOCH
_LAST: Final = datetime(9999, 12, 31, 23, 45, tzinfo=UTC) - _EPOCH


@dataclass(frozen=True, slots=True)
class Period:
    """From `start_s` up to and without `end_s`, Unix seconds on quarter boundaries; None is open."""

    start_s: int | None = None
    end_s: int | None = None


def quarter_of(unix_s: float) -> int:
    """The beginning of the quarter of an hour that a Unix time falls in, in Unix seconds."""
    return int(unix_s // QUARTER_S) * QUARTER_S


def as_rfc3339(unix_s: int | None) -> str | None:
    """Unix seconds as text, such as `2026-11-24T10:15:00Z`."""
    if unix_s is None:
        return None
    return f"{(_EPOCH + timedelta(seconds=unix_s)).replace(tzinfo=None).isoformat()}Z"


def parse_period(start: str | None, end: str | None) -> Period:
    """The period of a query's `from` and `to`; absent and empty are open. Raises InvalidRequest."""
    period = Period(_parsed("from", start) if start else None, _parsed("to", end) if end else None)
    if period.start_s is not None and period.end_s is not None and period.start_s >= period.end_s:
        raise InvalidRequest(
            f"'to' must be later than 'from': {quoted(str(end))} is not after {quoted(str(start))}.", param="to"
        )
    return period


def _parsed(name: str, text: str) -> int:
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise _not_a_time(name, text)
    day, time_of_day, zone = match[1], match[2] or "00:00:00", (match[3] or "Z").replace(" ", "+").upper()
    try:
        moment = datetime.fromisoformat(f"{day}T{time_of_day}{zone}")
        elapsed = moment - _EPOCH
    except (ValueError, OverflowError):
        raise _not_a_time(name, text) from None
    if not _FIRST <= elapsed <= _LAST:
        raise _not_a_time(name, text)
    if elapsed % timedelta(seconds=QUARTER_S):
        below = int(elapsed // timedelta(seconds=QUARTER_S)) * QUARTER_S
        near = f"{as_rfc3339(below)} or {as_rfc3339(below + QUARTER_S)}"
        raise InvalidRequest(f"'{name}': usage is kept by the quarter of an hour. Write {near}.", param=name)
    return int(elapsed // timedelta(seconds=1))


def _not_a_time(name: str, text: str) -> InvalidRequest:
    shown = text if len(text) <= 40 else f"{text[:40]}…"
    return InvalidRequest(
        f"'{name}' is no date and no time: {shown!r}. Write 2026-11-24 (midnight UTC) or 2026-11-24T10:15:00Z.",
        param=name,
    )
