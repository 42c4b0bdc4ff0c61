"""Ledgers on a clock that stands still, over a database that can be made to fail."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from manylora.api.record import RequestRecord
from manylora.database.database import Database, Topic
from manylora.database.tables import UsageRow
from manylora.errors import DatabaseUnavailable
from manylora.identity import AdapterRef
from manylora.lora.memory.occupancy import Occupancy
from manylora.usage.interface import Use
from manylora.usage.ledger import UsageLedger

QUARTER = 1_795_521_600
REF = AdapterRef("v1", "public", "sql", 3, "d")


def use(tenant: str = "acme", adapter: AdapterRef | None = REF, outcome: str = "ok", tokens: int = 5) -> Use:
    return RequestRecord(
        request_id="r",
        tenant=tenant,
        adapter=adapter,
        outcome=outcome,
        finished_at=0.0,
        duration_s=0.0,
        prompt_tokens=10,
        completion_tokens=tokens,
        cached_tokens=1,
    )


class Clock:
    """Unix seconds that stand still."""

    def __init__(self) -> None:
        self.now = QUARTER + 1.0

    def __call__(self) -> float:
        return self.now

    def us(self) -> int:
        return int(self.now * 1_000_000)


class Broken(Database):
    """A database that refuses to write while it `is_down`, or confirms nothing while it `is_mute`."""

    is_down = False
    is_mute = False

    @contextmanager
    def write(self, topic: Topic | None) -> Iterator[Session]:
        if self.is_down:
            raise DatabaseUnavailable("The database cannot be used: its disk does not answer.")
        with super().write(topic) as session:
            yield session
        if self.is_mute:
            raise DatabaseUnavailable("The database cannot be used: the connection was lost.")


def ledger_of(
    database: Database, clock: Clock, occupancy: Occupancy | None = None, wait_s: float = 60.0
) -> UsageLedger:
    occupancy = occupancy or Occupancy(clock.us)
    ledger = UsageLedger(database, occupancy, Path("journals"), wait_s=wait_s, clock=clock, retry_s=0.01)
    ledger.start()
    return ledger


def killed(ledger: UsageLedger) -> None:
    """As kill -9 leaves it: what its threads had begun may end, or not."""
    for task in ledger._tasks:
        task.cancel()


def rows(database: Database, table: Any = UsageRow) -> list[tuple[Any, ...]]:
    columns = table.__table__.c
    with database.read() as session:
        return [tuple(row) for row in session.execute(select(*columns).order_by(*columns))]


async def taken_over(ledger: UsageLedger, folder: Path) -> None:
    """Wait until the journals of earlier processes are in the database."""
    async with asyncio.timeout(20):
        await ledger._tasks[1]
    assert list(folder.iterdir()) == []
    await ledger.aclose()
