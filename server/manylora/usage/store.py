"""Usage into the database: counts are added to what is there, in one transaction per batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Insert, Table, delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from manylora.database.database import Database
from manylora.database.tables import MICROSECONDS, CanaryCountRow, SlotTimeRow, StoredRow, UsageRow, UsageWriterRow

__all__ = ["Batch", "UsageKey", "UsageStore", "note_stored"]

# quarter, tenant, owner, adapter, outcome
UsageKey = tuple[int, str, str, str, str]
Counts = Sequence[int]  # requests, prompt tokens, completion tokens, cached tokens
SlotKey = tuple[int, str, str]  # quarter, tenant, adapter
CanaryKey = tuple[str, int, str]  # canary, version, outcome

_USAGE_KEY: Final = ("quarter", "tenant", "owner", "adapter", "outcome")
_USAGE_SUMS: Final = ("requests", "prompt_tokens", "completion_tokens", "cached_tokens")
_SLOT_KEY: Final = ("quarter", "tenant", "adapter")
_SLOT_SUMS: Final = ("microseconds",)
_CANARY_KEY: Final = ("canary", "version", "outcome")
_CANARY_SUMS: Final = (*_USAGE_SUMS, "first_tokens", "ttft_us")
# A process that was killed leaves its row behind, and perhaps a journal, by which a start knows what it had written.
_FORGET_WRITERS_US: Final = 90 * 86_400 * MICROSECONDS


@dataclass(slots=True)
class Batch:
    """What is to be added: four counts per key, microseconds in slots, and six counts of canaries' versions."""

    usage: dict[UsageKey, list[int]] = field(default_factory=dict)
    slots: dict[SlotKey, int] = field(default_factory=dict)
    canaries: dict[CanaryKey, list[int]] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        return not self.usage and not self.slots  # what a canary decided on is usage, too

    def add(self, key: UsageKey, counts: Counts) -> None:
        """Add to a key's counts."""
        mine = self.usage.setdefault(key, [0, 0, 0, 0])
        self.usage[key] = [a + b for a, b in zip(mine, counts, strict=True)]

    def add_canary(self, key: CanaryKey, counts: Counts) -> None:
        """Add to what requests came to that a canary decided on."""
        mine = self.canaries.setdefault(key, [0] * len(_CANARY_SUMS))
        self.canaries[key] = [a + b for a, b in zip(mine, counts, strict=True)]

    def copy(self) -> "Batch":
        copied = Batch()
        copied.merge(self)
        return copied

    def merge(self, other: "Batch") -> None:
        for key, counts in other.usage.items():
            self.add(key, counts)
        for slot, microseconds in other.slots.items():
            self.add_slot_time(slot, microseconds)
        for canary, sums in other.canaries.items():
            self.add_canary(canary, sums)

    @property
    def num_requests(self) -> int:
        return sum(counts[0] for counts in self.usage.values())

    def add_slot_time(self, key: SlotKey, microseconds: int) -> None:
        self.slots[key] = self.slots.get(key, 0) + microseconds


class UsageStore:
    """One writer's way to the database. Methods block."""

    def __init__(self, database: Database, writer: str) -> None:
        self._database = database
        self._writer = writer
        self._add_usage = self._adding(UsageRow, _USAGE_KEY, _USAGE_SUMS)
        self._add_slots = self._adding(SlotTimeRow, _SLOT_KEY, _SLOT_SUMS)
        self._add_canaries = self._adding(CanaryCountRow, _CANARY_KEY, _CANARY_SUMS)
        self._number_batch = self._numbering()

    def prepare(self) -> None:
        """Run the statements of a write and take them back: compiling them takes milliseconds, the first time."""
        key: UsageKey = (0, "", "", "", "")
        with self._database.write(None) as session:
            self._execute(session, 1, Batch(usage={key: [0, 0, 0, 0]}), 0)
            session.rollback()

    def write(self, number: int, batch: Batch, now_us: int) -> None:
        """Add batch `number`, once: where the connection broke while the answer was on its way, send it again.

        Keys are sorted, so that two servers which add to the same rows never wait for each other.
        """
        with self._database.write(None) as session:
            self._execute(session, number, batch, now_us)

    def write_again(self, batches: Sequence[tuple[int, Batch]], now_us: int) -> int:
        """Add those of this writer's numbered batches that the database has not; how many requests these were."""
        query = select(UsageWriterRow.batch).where(UsageWriterRow.id == self._writer)
        with self._database.write(None) as session:
            last = session.execute(query).scalar_one_or_none() or 0
            missing = Batch()
            for number, batch in batches:
                if number > last:
                    missing.merge(batch)
            if missing.is_empty:
                return 0
            self._execute(session, max(number for number, _ in batches), missing, now_us)
            return missing.num_requests

    def _execute(self, session: Session, number: int, batch: Batch, now_us: int) -> None:
        connection = session.connection()
        known = {"id": self._writer, "batch": number, "at": now_us}
        if connection.execute(self._number_batch, known).first() is None:
            return
        if batch.usage:
            columns = (*_USAGE_KEY, *_USAGE_SUMS)
            rows = [dict(zip(columns, (*key, *sums), strict=True)) for key, sums in sorted(batch.usage.items())]
            connection.execute(self._add_usage, rows)
        if batch.slots:
            named = (*_SLOT_KEY, *_SLOT_SUMS)
            times = [dict(zip(named, (*key, time_us), strict=True)) for key, time_us in sorted(batch.slots.items())]
            connection.execute(self._add_slots, times)
        if batch.canaries:
            fields = (*_CANARY_KEY, *_CANARY_SUMS)
            found = [dict(zip(fields, (*key, *sums), strict=True)) for key, sums in sorted(batch.canaries.items())]
            connection.execute(self._add_canaries, found)

    def forget_writer(self, now_us: int) -> None:
        """Nothing of this process will be sent again, nor of those that went silent long ago."""
        is_done = (UsageWriterRow.id == self._writer) | (UsageWriterRow.at < now_us - _FORGET_WRITERS_US)
        with self._database.write(None) as session:
            session.execute(delete(UsageWriterRow).where(is_done))

    def _insert(self, row: Any) -> Any:
        table: Table = row.__table__
        return sqlite.insert(table) if self._database.is_sqlite else postgresql.insert(table)

    def _adding(self, row: Any, key: tuple[str, ...], sums: tuple[str, ...]) -> Insert:
        insert = self._insert(row)
        columns = row.__table__.c
        added: Insert = insert.on_conflict_do_update(
            index_elements=list(key), set_={name: columns[name] + insert.excluded[name] for name in sums}
        )
        return added

    def _numbering(self) -> Any:
        """The statement that notes a batch's number; its result has a row where the batch is new."""
        insert = self._insert(UsageWriterRow)
        numbered = insert.on_conflict_do_update(
            index_elements=["id"],
            set_={"batch": insert.excluded.batch, "at": insert.excluded.at},
            where=UsageWriterRow.batch < insert.excluded.batch,
        )
        return numbered.returning(UsageWriterRow.id)


def note_stored(session: Session, tenant: str, adapter: str, size_bytes: int, now_us: int) -> None:
    """Within a change to an adapter: what its versions take from now on, where that is another size than before."""
    query = select(StoredRow.size_bytes).where(StoredRow.tenant == tenant, StoredRow.adapter == adapter)
    before = session.execute(query.order_by(StoredRow.id.desc()).limit(1)).scalar_one_or_none()
    if size_bytes != (before or 0):
        session.add(StoredRow(tenant=tenant, adapter=adapter, at=now_us, size_bytes=size_bytes))
