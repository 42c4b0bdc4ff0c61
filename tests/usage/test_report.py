"""Sums: groups, periods, bytes stored over time."""

import itertools
from typing import Any

import pytest

from manylora.database.database import Database
from manylora.database.tables import StoredRow
from manylora.errors import InvalidRequest
from manylora.usage.period import DAY_S, QUARTER_S, Period
from manylora.usage.prices import Prices
from manylora.usage.report import GROUPS, MAX_HOURS, Group, UsageReport, make_report, parse_groups
from manylora.usage.store import Batch, UsageStore

DAY = 20_781 * DAY_S  # 2026-11-24
NOW_US = (DAY + 2 * DAY_S) * 1_000_000
FINEST: tuple[Group, ...] = ("tenant", "adapter", "day")
GROUPINGS = [
    groups for n in range(4) for groups in itertools.combinations(GROUPS, n) if not {"day", "hour"} <= set(groups)
]


@pytest.fixture
def filled(database: Database) -> Database:
    """Two tenants, an adapter of each, a public one and the base, on two days; 1 request of 3 + 2 tokens each."""
    batch = Batch()
    for tenant, owner, adapter, quarter in [
        ("acme", "acme", "sql", DAY),
        ("acme", "acme", "sql", DAY + DAY_S - QUARTER_S),
        ("acme", "acme", "sql", DAY + DAY_S),
        ("acme", "public", "sql", DAY),
        ("acme", "", "", DAY),
        ("rival", "rival", "sql", DAY + QUARTER_S),
    ]:
        batch.add((quarter, tenant, owner, adapter, "ok"), (1, 3, 2, 1))
    batch.add((DAY, "acme", "acme", "sql", "cancelled"), (1, 3, 0, 0))
    batch.add_slot_time((DAY, "acme", "sql"), 1_500_000)
    batch.add_slot_time((DAY + DAY_S, "acme", "sql"), 1)
    batch.add_slot_time((DAY, "public", "sql"), 7)
    UsageStore(database, "w").write(1, batch, now_us=0)
    return database


def report(
    database: Database, *groups: Group, tenant: str | None = None, start: int | None = None, end: int | None = None
) -> UsageReport:
    return make_report(database, Period(start, end), groups, tenant=tenant, now_us=NOW_US)


def found(made: UsageReport, *columns: str) -> list[tuple[Any, ...]]:
    return [tuple(row[column] for column in columns) for row in made.as_dict()["data"]]


def test_the_finest_rows_are_in_order_of_day_tenant_and_adapter(filled: Database) -> None:
    made = report(filled, *FINEST)
    assert found(made, "day", "tenant", "adapter", "adapter_tenant", "requests") == [
        ("2026-11-24", "acme", None, None, 1),
        ("2026-11-24", "acme", "sql", "acme", 3),
        ("2026-11-24", "acme", "sql", "public", 1),
        ("2026-11-24", "public", "sql", "public", 0),
        ("2026-11-24", "rival", "sql", "rival", 1),
        ("2026-11-25", "acme", "sql", "acme", 1),
    ]
    assert found(made, "slot_seconds")[1] == (1.5,)
    assert made.lines[1][1].outcomes == {"cancelled": 1, "ok": 2}


@pytest.mark.parametrize("groups", GROUPINGS)
def test_every_grouping_sums_to_the_same_total(filled: Database, groups: tuple[Group, ...]) -> None:
    made = report(filled, *groups, start=DAY)
    total = made.total
    assert (total.requests, total.prompt_tokens, total.completion_tokens, total.cached_tokens) == (7, 21, 12, 6)
    assert (total.slot_us, total.outcomes) == (1_500_008, {"cancelled": 1, "ok": 6})
    for name in ("requests", "prompt_tokens", "completion_tokens", "cached_tokens", "slot_us"):
        assert sum(getattr(line, name) for _, line in made.lines) == getattr(total, name)
    assert all(set(names) - {"adapter_tenant"} == set(groups) for names, _ in made.lines)


def test_hours_are_told_apart_from_their_beginnings(filled: Database) -> None:
    made = report(filled, "hour", start=DAY)
    assert found(made, "hour", "requests") == [
        ("2026-11-24T00:00:00Z", 5),
        ("2026-11-24T23:00:00Z", 1),
        ("2026-11-25T00:00:00Z", 1),
    ]


def test_bytes_are_cut_at_each_hour(database: Database) -> None:
    with database.write(None) as session:
        session.add(StoredRow(tenant="acme", adapter="sql", at=(DAY + QUARTER_S) * 1_000_000, size_bytes=100))
    made = report(database, "hour", start=DAY, end=DAY + 2 * 3600)
    assert found(made, "stored_byte_hours", "stored_bytes") == [(75.0, 100), (100.0, 100)]


@pytest.mark.parametrize("start", [None, DAY + 2 * DAY_S - MAX_HOURS * 3600 - QUARTER_S])
def test_hours_need_a_beginning_that_is_near(filled: Database, start: int | None) -> None:
    with pytest.raises(InvalidRequest, match="31 days") as caught:
        report(filled, "hour", start=start)
    assert caught.value.param == "from"
    assert report(filled, "hour", start=DAY + 2 * DAY_S - MAX_HOURS * 3600).total.requests == 7


def test_lines_and_total_say_what_they_cost(filled: Database) -> None:
    prices = Prices.of("EUR", prompt=0.1, cached=None, completion=0.3, training=None)
    assert prices is not None
    shown = report(filled, "tenant").as_dict(prices)
    assert [row["cost"] for row in shown["data"]] == [0.0048, 0.0, 0.0009]
    assert shown["total"]["cost"] == 0.0057
    told = {"currency": "EUR", "per_tokens": 1000, "prompt": 0.1, "cached": 0.1, "completion": 0.3, "training": 0.0}
    assert shown["prices"] == told
    cheaper = Prices.of("EUR", prompt=0.1, cached=0.0, completion=0.3, training=None)
    assert report(filled, "tenant").as_dict(cheaper)["total"]["cost"] == 0.0051
    assert Prices.of("EUR", prompt=None, cached=None, completion=None, training=None) is None
    assert "cost" not in report(filled, "tenant").as_dict()["total"]


def test_a_tenant_sees_its_own_rows_alone(filled: Database) -> None:
    assert found(report(filled, "tenant", "adapter", tenant="rival"), "tenant", "requests") == [("rival", 1)]
    assert report(filled, tenant="acme").total.requests == 6
    assert report(filled, tenant="acme").total.slot_us == 1_500_001


def test_the_beginning_counts_and_the_end_does_not(filled: Database) -> None:
    assert report(filled, start=DAY + DAY_S).total.requests == 1
    assert report(filled, end=DAY + DAY_S).total.requests == 6
    assert report(filled, start=DAY + QUARTER_S, end=DAY + 2 * QUARTER_S).total.requests == 1


def test_an_empty_database_has_no_rows_and_a_total_of_nothing(database: Database) -> None:
    made = report(database, *FINEST).as_dict()
    assert made["data"] == []
    assert made["total"]["requests"] == 0


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        (None, ("tenant", "adapter")),
        ("", ("tenant", "adapter")),
        ("day,tenant", ("tenant", "day")),
        (" day ", ("day",)),
    ],
)
def test_groups_come_in_one_order(text: str | None, groups: tuple[Group, ...]) -> None:
    assert parse_groups(text) == groups


@pytest.mark.parametrize("text", ["month", "tenant,", "tenant;day", "day,day", "TENANT", "x" * 1000])
def test_other_groups_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_groups(text)
    assert caught.value.param == "group_by"
    assert len(caught.value.message) < 200


# bytes stored


def keep(database: Database, *changes: tuple[str, str, float, int]) -> None:
    """(tenant, adapter, days after DAY, bytes) in order of writing."""
    with database.write(None) as session:
        for tenant, adapter, days, size in changes:
            at = (DAY * 1_000_000) + int(days * DAY_S * 1_000_000)
            session.add(StoredRow(tenant=tenant, adapter=adapter, at=at, size_bytes=size))
            session.flush()


def test_bytes_stored_are_those_at_the_end_and_their_hours_those_between(database: Database) -> None:
    keep(database, ("acme", "sql", 0.5, 100), ("acme", "sql", 1.25, 300), ("rival", "x", 0, 7), ("rival", "x", 1, 0))
    made = report(database, "tenant")
    columns = ("tenant", "stored_bytes", "stored_byte_hours")
    assert found(made, *columns) == [("acme", 300, 100 * 18 + 300 * 18), ("rival", 0, 7 * 24)]
    assert made.total.stored_bytes == 300


def test_bytes_stored_by_day_are_those_at_the_days_end(database: Database) -> None:
    keep(database, ("acme", "sql", 0.5, 100), ("acme", "sql", 1.25, 300), ("acme", "sql", 1.5, 0))
    made = report(database, "day")
    columns = ("day", "stored_bytes", "stored_byte_hours")
    assert found(made, *columns) == [("2026-11-24", 100, 1200), ("2026-11-25", 0, 100 * 6 + 300 * 6)]
    assert made.total.stored_bytes == 0


def test_bytes_stored_before_the_beginning_count_from_it_on(database: Database) -> None:
    keep(database, ("acme", "sql", -10, 100))
    made = report(database, "adapter", start=DAY, end=DAY + DAY_S)
    assert found(made, "stored_bytes", "stored_byte_hours") == [(100, 2400)]


def test_nothing_is_stored_in_the_future(database: Database) -> None:
    keep(database, ("acme", "sql", 1, 100))
    assert found(report(database, "tenant", end=DAY + 100 * DAY_S), "stored_byte_hours") == [(2400,)]
    assert report(database, "day", start=DAY + 3 * DAY_S).lines == []


def test_a_clock_that_was_set_back_makes_no_negative_time(database: Database) -> None:
    keep(database, ("acme", "sql", 1, 100), ("acme", "sql", 0.5, 50), ("acme", "sql", 1.5, 0))
    assert found(report(database, "tenant"), "stored_byte_hours") == [(50 * 12,)]
