"""Counting into the database: nothing lost, nothing twice."""

import asyncio
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy.orm import Session

from manylora.database.database import Database, Topic, open_database
from manylora.database.tables import SlotTimeRow, UsageWriterRow
from manylora.identity import AdapterRef
from manylora.lora.memory.occupancy import Occupancy, Stay
from manylora.usage.ledger import UsageLedger, add_stays
from manylora.usage.period import QUARTER_S
from manylora.usage.store import Batch, UsageStore

from .ledgers import QUARTER, REF, Broken, Clock, killed, ledger_of, rows, use

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("folder")]


async def test_a_count_is_in_the_database_when_it_is_said_to_be_stored(database: Database) -> None:
    ledger = ledger_of(database, Clock())
    ledger.add(use())
    await ledger.stored()
    assert rows(database) == [(QUARTER, "acme", "public", "sql", "ok", 1, 10, 5, 1)]
    await ledger.aclose()


async def test_counts_of_one_key_add_up_and_others_stay_apart(database: Database) -> None:
    clock = Clock()
    ledger = ledger_of(database, clock)
    for each in (use(), use(tokens=7), use("rival"), use(adapter=None), use(outcome="cancelled")):
        ledger.add(each)
        await ledger.stored()
    clock.now += QUARTER_S
    ledger.add(use())
    await ledger.aclose()
    assert [row[:6] for row in rows(database)] == [
        (QUARTER, "acme", "", "", "ok", 1),
        (QUARTER, "acme", "public", "sql", "cancelled", 1),
        (QUARTER, "acme", "public", "sql", "ok", 2),
        (QUARTER, "rival", "public", "sql", "ok", 1),
        (QUARTER + QUARTER_S, "acme", "public", "sql", "ok", 1),
    ]
    assert rows(database)[2][7] == 12


def test_preparing_leaves_nothing_behind_and_takes_no_number(database: Database) -> None:
    store = UsageStore(database, "w")
    store.prepare()
    assert rows(database) == rows(database, UsageWriterRow) == []
    store.write(1, Batch(usage={(QUARTER, "acme", "", "", "ok"): [1, 2, 3, 0]}), now_us=5)
    assert [row[5:] for row in rows(database)] == [(1, 2, 3, 0)]


async def test_two_servers_on_one_database_add_to_the_same_rows(database: Database, database_url: str) -> None:
    second = open_database(database_url)
    ledgers = [ledger_of(each, Clock()) for each in (database, second)]
    refs = [AdapterRef(f"v{n}", "public", f"a{n}", 1, "d") for n in range(4)]

    async def busy(ledger: UsageLedger, order: int) -> None:
        for _ in range(20):
            for ref in refs[::order]:
                ledger.add(use(adapter=ref))
            await ledger.stored()

    await asyncio.gather(busy(ledgers[0], 1), busy(ledgers[1], -1))
    for ledger in ledgers:
        await ledger.aclose()
    assert [row[5] for row in rows(database)] == [40] * 4
    second.close()


async def test_what_ends_while_a_transaction_runs_shares_the_next_one(database: Database) -> None:
    writes = 0

    class Counting(Database):
        @contextmanager
        def write(self, topic: Topic | None) -> Iterator[Session]:
            nonlocal writes
            writes += 1
            with super().write(topic) as session:
                yield session

    ledger = ledger_of(Counting(database._engine), Clock())

    async def request() -> None:
        ledger.add(use())
        await ledger.stored()

    await asyncio.gather(*(request() for _ in range(100)))
    assert writes <= 3
    assert rows(database)[0][5] == 100
    await ledger.aclose()


async def test_a_database_that_is_down_holds_nobody_up_and_gets_everything_later(
    broken: Broken, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = ledger_of(broken, Clock())
    broken.is_down = True
    with caplog.at_level(logging.ERROR):
        for _ in range(10):
            ledger.add(use())
            await ledger.stored()
    assert len(caplog.records) == 1
    assert rows(broken) == []
    broken.is_down = False
    while not rows(broken):
        await asyncio.sleep(0.01)
    ledger.add(use())
    await ledger.aclose()
    assert rows(broken)[0][5] == 11


@pytest.mark.parametrize("error", [KeyError("a bug"), RuntimeError("another")])
async def test_a_write_that_fails_as_nobody_thought_of_is_tried_again_too(
    error: Exception, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = ledger_of(database, Clock())
    write, num_failed = ledger._store.write, 0

    def failing(*args: Any) -> None:
        nonlocal num_failed
        num_failed += 1
        if num_failed < 3:
            raise error
        write(*args)

    monkeypatch.setattr(ledger._store, "write", failing)
    ledger.add(use())
    await asyncio.wait_for(ledger.stored(), 30)
    while not rows(database):
        await asyncio.sleep(0.01)
    await ledger.aclose()
    assert num_failed == 3


async def test_a_batch_whose_confirmation_was_lost_is_not_counted_twice(broken: Broken) -> None:
    ledger = ledger_of(broken, Clock())
    broken.is_mute = True
    ledger.add(use())
    await ledger.stored()
    broken.is_mute = False
    ledger.add(use(tokens=1))
    await ledger.aclose()
    assert [(row[5], row[7]) for row in rows(broken)] == [(2, 6)]


async def test_what_neither_database_nor_journal_took_is_said_to_be_lost(
    broken: Broken, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_text("no folder, so that the journal fails too")
    ledger = ledger_of(broken, Clock())
    broken.is_down = True
    ledger.add(use())
    with caplog.at_level(logging.ERROR):
        await ledger.aclose()
    assert "The usage of 1 requests is lost" in caplog.text


async def test_a_writer_that_has_ended_leaves_no_trace_of_itself(database: Database) -> None:
    ledger = ledger_of(database, Clock())
    ledger.add(use())
    await ledger.stored()
    assert len(rows(database, UsageWriterRow)) == 1
    await ledger.aclose()
    assert rows(database, UsageWriterRow) == []


def test_writers_that_were_killed_are_forgotten_after_a_quarter_of_a_year(database: Database) -> None:
    killed, ended = (UsageStore(database, name) for name in ("killed", "ended"))
    batch = Batch()
    batch.add((QUARTER, "acme", "", "", "ok"), (1, 1, 1, 0))
    season_us = 90 * 86_400 * 1_000_000
    killed.write(1, batch, now_us=0)
    ended.write(1, batch, now_us=season_us)
    ended.forget_writer(now_us=season_us)
    assert [row[0] for row in rows(database, UsageWriterRow)] == ["killed"]
    ended.forget_writer(now_us=season_us + 1)
    assert rows(database, UsageWriterRow) == []


# time in slots


async def test_time_in_slots_is_counted_to_the_microsecond_for_the_owner(database: Database) -> None:
    clock = Clock()
    occupancy = Occupancy(clock.us)
    ledger = ledger_of(database, clock, occupancy)
    occupancy.enter(REF)
    clock.now += 2.5
    await ledger.flush()
    assert rows(database, SlotTimeRow) == [(QUARTER, "public", "sql", 2_500_000)]
    clock.now += 1.25
    occupancy.leave(REF)
    clock.now += 10
    await ledger.flush()
    assert rows(database, SlotTimeRow) == [(QUARTER, "public", "sql", 3_750_000)]
    await ledger.aclose()


async def test_looking_often_does_not_write_often(database: Database) -> None:
    clock = Clock()
    occupancy = Occupancy(clock.us)
    ledger = ledger_of(database, clock, occupancy)
    occupancy.enter(REF)
    for _ in range(16):
        await ledger.flush()
        clock.now += 0.125
    assert rows(database, SlotTimeRow) == [(QUARTER, "public", "sql", 1_000_000)]
    await ledger.aclose()
    assert rows(database, SlotTimeRow) == [(QUARTER, "public", "sql", 2_000_000)]


async def test_the_end_of_the_server_ends_every_stay(database: Database) -> None:
    clock = Clock()
    occupancy = Occupancy(clock.us)
    ledger = ledger_of(database, clock, occupancy)
    occupancy.enter(REF)
    clock.now += 7
    await ledger.aclose()
    assert rows(database, SlotTimeRow) == [(QUARTER, "public", "sql", 7_000_000)]


def test_a_stay_is_cut_where_quarters_begin_and_its_parts_are_the_whole() -> None:
    batch = Batch()
    start_us = (QUARTER - 1) * 1_000_000
    add_stays(batch, [Stay("acme", "sql", 5, 5 + 1_802_000_001)], offset_us=start_us - 5)
    assert batch.slots == {
        (QUARTER - QUARTER_S, "acme", "sql"): 1_000_000,
        (QUARTER, "acme", "sql"): 900_000_000,
        (QUARTER + QUARTER_S, "acme", "sql"): 900_000_000,
        (QUARTER + 2 * QUARTER_S, "acme", "sql"): 1_000_001,
    }


# whatever happens


@pytest.mark.parametrize("seed", range(5))
async def test_random_lives_lose_nothing_and_count_nothing_twice(broken: Broken, seed: int) -> None:
    chance = random.Random(seed)
    clock = Clock()
    occupancy = Occupancy(clock.us)
    ledger = ledger_of(broken, clock, occupancy)
    num_requests = num_tokens = slot_us = 0
    resident_since: int | None = None
    for _ in range(150):
        match chance.choice(
            ["add", "add", "add", "stored", "break", "mend", "slot", "look", "restart", "kill", "wait"]
        ):
            case "add":
                tokens = chance.randrange(100)
                ledger.add(use(chance.choice("xyz"), tokens=tokens))
                num_requests, num_tokens = num_requests + 1, num_tokens + tokens
            case "stored":
                await ledger.stored()
            case "break":
                broken.is_down, broken.is_mute = chance.choice([(True, False), (False, True)])
            case "mend":
                broken.is_down = broken.is_mute = False
            case "slot" if resident_since is None:
                occupancy.enter(REF)
                resident_since = clock.us()
            case "slot" if resident_since is not None:
                occupancy.leave(REF)
                slot_us += clock.us() - resident_since
                resident_since = None
            case "look":
                await ledger.flush()
            case "restart":
                broken.is_down = broken.is_mute = False
                await ledger.aclose()
                ledger = ledger_of(broken, clock, occupancy)
            case "kill":  # after an answer: nothing that was acknowledged is missing
                await ledger.flush()
                killed(ledger)
                ledger = ledger_of(broken, clock, occupancy)
            case "wait":
                clock.now += chance.random() * 1000
                await asyncio.sleep(0)
    broken.is_down = broken.is_mute = False
    async with asyncio.timeout(20):
        await ledger._tasks[1]
    await ledger.aclose()
    slot_us += 0 if resident_since is None else clock.us() - resident_since
    assert sum(row[5] for row in rows(broken)) == num_requests
    assert sum(row[7] for row in rows(broken)) == num_tokens
    assert sum(row[3] for row in rows(broken, SlotTimeRow)) == slot_us


@pytest.mark.slow
async def test_a_connection_that_broke_is_replaced_and_nothing_is_lost(postgres_url: str) -> None:
    database = open_database(postgres_url)
    ledger = ledger_of(database, Clock())
    ledger.add(use())
    await ledger.stored()
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    ledger.add(use())
    await ledger.stored()
    ledger.add(use())
    await ledger.aclose()
    assert rows(database)[0][5] == 3
    database.close()
