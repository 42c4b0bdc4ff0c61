"""What `from` and `to` take."""

import pytest

from manylora.errors import InvalidRequest
from manylora.usage.period import DAY_S, Period, as_rfc3339, parse_period

NOON = 1_795_521_600  # 2026-11-24T12:00:00Z


@pytest.mark.parametrize(
    ("text", "unix_s"),
    [
        ("2026-11-24", NOON - 12 * 3600),
        ("2026-11-24T12:00:00Z", NOON),
        ("2026-11-24t12:00:00z", NOON),
        ("2026-11-24 12:00:00Z", NOON),
        ("2026-11-24T12:00:00.000Z", NOON),
        ("2026-11-24T12:15:00Z", NOON + 900),
        ("2026-11-24T17:45:00+05:45", NOON),
        ("2026-11-24T17:45:00 05:45", NOON),  # a `+` that nobody encoded
        ("2026-11-24T04:00:00-08:00", NOON),
        ("1969-12-31", -DAY_S),
    ],
)
def test_dates_and_times_with_any_offset_are_understood(text: str, unix_s: int) -> None:
    assert parse_period(text, None) == Period(unix_s, None)


@pytest.mark.parametrize("text", ["0001-01-01", "0001-01-01T00:15:00+00:15", "9999-12-31T23:45:00Z"])
def test_the_first_and_the_last_time_can_be_read_and_shown(text: str) -> None:
    assert parse_period(as_rfc3339(parse_period(text, None).start_s), None) == parse_period(text, None)


def test_absent_and_empty_are_open() -> None:
    assert parse_period(None, "") == Period(None, None)


@pytest.mark.parametrize(
    "text",
    [
        "yesterday", "2026-11", "20261124", "2026-13-01", "2026-02-30", "2026-11-24T12:00:00", "2026-11-24T25:00:00Z",
        "2026-11-24T12:00Z", "2026-11-24T12:00:00+99:00", "2026-W48-2", "1795521600", "２０２６-11-24", "0000-01-01",
        "2026-11-24T12:00:00Z; DROP TABLE usage", "0001-01-01T00:00:00+00:15", "0001-01-01T00:00:00+23:59",
        "9999-12-31T23:45:00-00:15", "9999-12-31T23:45:00-23:59", "9999-12-31T23:59:59Z",
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["from", "to"])
def test_anything_else_is_refused_by_name(text: str, name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_period(text if name == "from" else None, text if name == "to" else None)
    assert caught.value.param == name


@pytest.mark.parametrize("text", ["2026-11-24T12:07:00Z", "2026-11-24T12:00:00.5Z", "2026-11-24T12:14:59.999999Z"])
def test_a_time_between_quarters_is_refused_with_the_nearest_ones(text: str) -> None:
    with pytest.raises(InvalidRequest, match="Write 2026-11-24T12:00:00Z or 2026-11-24T12:15:00Z"):
        parse_period(text, None)


def test_the_end_must_be_later_than_the_beginning() -> None:
    with pytest.raises(InvalidRequest, match="later"):
        parse_period("2026-11-24", "2026-11-24")


def test_times_are_shown_as_they_are_taken() -> None:
    assert as_rfc3339(NOON) == "2026-11-24T12:00:00Z"
    assert as_rfc3339(None) is None
