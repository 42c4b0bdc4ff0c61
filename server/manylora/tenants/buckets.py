"""The buckets that servers on one PostgreSQL database share: a row for each quota, filled by the database's clock."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from sqlalchemy import delete, func, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from manylora.database.database import Database
from manylora.database.replicas import IS_LIVE, NOW, Replicas
from manylora.database.tables import MICROSECONDS, BucketRow, ReplicaRow, SeatRow
from manylora.tenants.quotas import BUSY_RETRY_S, MINUTE_S, NEVER_RETRY_S, Kind

__all__ = ["SharedBuckets", "Taken", "Want"]


@dataclass(frozen=True, slots=True)
class Want:
    """What a server asks of one bucket of `capacity` units a minute.

    `need` must be there; then `take` is taken, into debt if that is more, or up to `lease` where there is that much. Of
    `seats`, `need` is how many the server must hold in all, and `lease` how many it would like to.
    """

    kind: Kind
    capacity: int
    need: float
    take: float
    lease: float


@dataclass(slots=True)
class Taken:
    """What was got of each; and of the first that had too little, which it is and in how many seconds it has enough."""

    amounts: dict[Kind, float] = field(default_factory=dict)
    refused: Kind | None = None
    wait_s: float = 0.0


class SharedBuckets:
    """One server's access to them. Methods block, and raise DatabaseUnavailable."""

    def __init__(self, database: Database, replicas: Replicas) -> None:
        self._database = database
        self._replicas = replicas

    @property
    def num_servers(self) -> int:
        """As many as were there a few seconds ago, this one among them."""
        return self._replicas.num_live

    def take(self, tenant: str, wants: Sequence[Want]) -> Taken:
        """Ask for what is wanted, one after the other, up to the first that is refused."""
        taken = Taken()
        with self._transaction() as session:
            for want in wants:
                got, wait_s = (
                    self._take_seats(session, tenant, want)
                    if want.kind == "seats"
                    else _take_units(session, tenant, want)
                )
                if wait_s > 0:
                    taken.refused, taken.wait_s = want.kind, wait_s
                    break
                taken.amounts[want.kind] = got
        return taken

    def give_back(self, tenant: str, units: dict[Kind, tuple[float, int]], seats: int | None) -> None:
        """Put units back into buckets of a capacity, and hold no more than so many `seats` (None: those of before)."""
        with self._transaction() as session:
            for kind, (amount, capacity) in sorted(units.items()):
                level, at, now = _locked(session, tenant, kind, capacity)
                _put(session, tenant, kind, min(_refilled(level, at, now, capacity) + amount, capacity), now)
            if seats is not None:
                self._hold(session, tenant, seats)

    def leave(self) -> None:
        """Hold nothing any more; what others left that are gone goes too."""
        with self._transaction() as session:
            is_gone = SeatRow.replica.not_in(select(ReplicaRow.id))
            session.execute(delete(SeatRow).where((SeatRow.replica == self._replicas.id) | is_gone))

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        """One whose end does not wait for the disk."""
        with self._database.write(None) as session:
            session.execute(text("SET LOCAL synchronous_commit = off"))
            yield session

    def _take_seats(self, session: Session, tenant: str, want: Want) -> tuple[float, float]:
        if want.capacity == 0:
            return 0.0, NEVER_RETRY_S
        _locked(session, tenant, want.kind, want.capacity)  # one server at a time counts
        others = (
            select(func.coalesce(func.sum(SeatRow.held), 0))
            .join(ReplicaRow, ReplicaRow.id == SeatRow.replica)
            .where(SeatRow.tenant == tenant, SeatRow.replica != self._replicas.id, IS_LIVE)
        )
        left = want.capacity - int(session.execute(others).scalar_one())
        if left < want.need:
            return 0.0, BUSY_RETRY_S
        held = min(left, max(int(want.need), int(want.lease)))
        self._hold(session, tenant, held)
        return float(held), 0.0

    def _hold(self, session: Session, tenant: str, held: int) -> None:
        row = insert(SeatRow).values(tenant=tenant, replica=self._replicas.id, held=held)
        session.execute(row.on_conflict_do_update(index_elements=["tenant", "replica"], set_={"held": held}))


def _take_units(session: Session, tenant: str, want: Want) -> tuple[float, float]:
    if want.capacity == 0:
        return 0.0, NEVER_RETRY_S
    level, at, now = _locked(session, tenant, want.kind, want.capacity)
    level = _refilled(level, at, now, want.capacity)
    short = want.need - level
    if short > want.capacity * 1e-9:
        return 0.0, short * MINUTE_S / want.capacity
    taken = max(want.take, min(want.lease, level))
    _put(session, tenant, want.kind, level - taken, now)
    return taken, 0.0


def _locked(session: Session, tenant: str, kind: Kind, capacity: int) -> tuple[float, int, int]:
    """Level, when that was so, and the time now in microseconds, of a row that nobody else reads meanwhile."""
    new = insert(BucketRow).values(tenant=tenant, kind=kind, level=float(capacity), at=NOW)
    session.execute(new.on_conflict_do_nothing())
    b = BucketRow
    query = select(b.level, b.at, NOW).where(b.tenant == tenant, b.kind == kind).with_for_update()
    level, at, now = session.execute(query).one()
    return level, at, now


def _refilled(level: float, at: int, now: int, capacity: int) -> float:
    return min(level + max(now - at, 0) / MICROSECONDS * capacity / MINUTE_S, float(capacity))


def _put(session: Session, tenant: str, kind: Kind, level: float, now: int) -> None:
    query = update(BucketRow).where(BucketRow.tenant == tenant, BucketRow.kind == kind)
    session.execute(query.values(level=level, at=now))
