"""The servers on one PostgreSQL database, as they know of each other: each says every few seconds that it is there."""

import logging
import secrets
from hashlib import sha256
from typing import Final

from sqlalchemy import BigInteger, cast, delete, func, select
from sqlalchemy.dialects.postgresql import insert

from manylora.database.database import Database
from manylora.database.tables import MICROSECONDS, ReplicaRow

__all__ = ["BEAT_S", "IS_LIVE", "NOW", "Replicas"]

BEAT_S: Final = 3.0
# One that was silent for so long is taken to be gone: three beats that did not come, or a process that was killed.
_GONE_AFTER_US: Final = 9_000_000
_FORGOTTEN_AFTER_US: Final = 3_600_000_000
# The database's clock, since those of servers differ.
NOW: Final = cast(func.extract("epoch", func.clock_timestamp()) * MICROSECONDS, BigInteger)
IS_LIVE: Final = ReplicaRow.last_seen > NOW - _GONE_AFTER_US
_log = logging.getLogger(__name__)


class Replicas:
    """Servers that share a database, and this one's place among them; a SQLite database has one.

    `base` names the base model that this one serves. Methods block.
    """

    def __init__(self, database: Database, base: str) -> None:
        self.id = f"replica_{secrets.token_hex(12)}"
        self.live: frozenset[str] = frozenset({self.id})  # at the last beat
        self._database = database
        self._base = base

    @property
    def num_live(self) -> int:
        """Servers at the last beat, this one among them."""
        return len(self.live)

    def is_among(self, count: int, key: str) -> bool:
        """Whether this is one of the `count` servers that the key falls to, by rendezvous hashing.

        All servers that know of each other agree, and one more or less moves its own keys only.
        """
        ranked = sorted(self.live, key=lambda server: sha256(f"{server}/{key}".encode()).digest())
        return self.id in ranked[:count]

    def join(self, let_go: int) -> None:
        """The first beat. Says where another server serves another base."""
        self.beat(let_go)
        if self._database.is_sqlite:
            return
        with self._database.read() as session:
            others = select(func.count()).select_from(ReplicaRow).where(IS_LIVE, ReplicaRow.base != self._base)
            num_others = session.execute(others).scalar_one()
        if num_others:
            _log.warning(
                "%d other servers of this database serve a base model of other shapes. An adapter's newest version is "
                "ready on the servers of one of them only: give each base a database of its own.",
                num_others,
            )

    def beat(self, let_go: int) -> int:
        """Say that this server is there and holds nothing that was deleted up to revision `let_go`.

        Returns up to which revision no server holds anything.
        """
        if self._database.is_sqlite:
            return let_go
        with self._database.write(None) as session:
            seen = {"last_seen": NOW, "let_go": let_go}
            row = insert(ReplicaRow).values(id=self.id, base=self._base, **seen)
            session.execute(row.on_conflict_do_update(index_elements=["id"], set_=seen))
            rows = session.execute(select(ReplicaRow.id, ReplicaRow.let_go).where(IS_LIVE))
            found: dict[str, int] = {row.id: row.let_go for row in rows}
        self.live = frozenset(found)
        return min(found.values())

    def leave(self) -> None:
        """Say that it is there no more."""
        if not self._database.is_sqlite:
            with self._database.write(None) as session:
                is_old = ReplicaRow.last_seen < NOW - _FORGOTTEN_AFTER_US
                session.execute(delete(ReplicaRow).where((ReplicaRow.id == self.id) | is_old))
