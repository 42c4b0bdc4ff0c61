"""The SQL database behind catalog and tenants: SQLite by default, PostgreSQL by URL, migrated when opened."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, event, select, text, update
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.orm import Session

from manylora.catalog.faults import cause_of, database_error, database_errors, file_error
from manylora.catalog.tables import RevisionRow
from manylora.errors import StartupError, Unavailable

Topic = Literal["catalog", "tenants"]

# How long a lock that another program holds is waited for. Servers' own transactions take milliseconds.
_BUSY_TIMEOUT_MS: Final = 5_000
_CLOSE_WAIT_S: Final = 10.0
# Any fixed number: two processes that migrate the same PostgreSQL database take turns on it.
_MIGRATION_LOCK: Final = 7_217_001
_log = logging.getLogger(__name__)


class Database:
    """Transactions over one database. Thread-safe; `close` returns the connections."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._writing = engine.execution_options(manylora_write=True)
        self._num_in_use = 0
        self._is_closed = False
        self._changed = threading.Condition()

    @property
    def is_sqlite(self) -> bool:
        return self._engine.dialect.name == "sqlite"

    @contextmanager
    def read(self) -> Iterator[Session]:
        """One consistent view; nothing is written. Raises DatabaseUnavailable."""
        with database_errors(), self._in_use(), Session(self._engine) as session, session.begin():
            yield session

    @contextmanager
    def write(self, topic: Topic | None) -> Iterator[Session]:
        """One transaction that is wholly there, on disk, once the block has ended, or not at all.

        With a `topic`, its revision is raised first: on PostgreSQL that row's lock puts the topic's writers in
        one order, on SQLite `BEGIN IMMEDIATE` does. Raises DatabaseUnavailable or StorageFull.
        """
        with (
            database_errors(),
            self._in_use(),
            Session(self._writing, expire_on_commit=False) as session,
            session.begin(),
        ):
            if topic is not None:
                session.execute(
                    update(RevisionRow).where(RevisionRow.topic == topic).values(value=RevisionRow.value + 1)
                )
            yield session

    def revision(self, topic: Topic) -> int:
        """A number that grows with every change to the topic, by whichever process."""
        with self.read() as session:
            return session.execute(select(RevisionRow.value).where(RevisionRow.topic == topic)).scalar_one()

    @contextmanager
    def named_lock(self, number: int) -> Iterator[None]:
        """Exclude other processes that hold the same 63-bit number, where several can share the database.

        A SQLite database has one server (see `catalog.lockfile`), so there is nobody to exclude.
        """
        if self.is_sqlite:
            yield
            return
        with database_errors(), self._in_use(), self._engine.connect() as connection:
            connection.execute(text("SELECT pg_advisory_lock(:n)"), {"n": number})
            try:
                yield
            finally:
                try:
                    connection.execute(text("SELECT pg_advisory_unlock(:n)"), {"n": number})
                except SQLAlchemyError:
                    connection.invalidate()  # the lock goes with the connection, and what was done under it stands

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        with self._changed:
            if self._is_closed:
                raise RuntimeError("The database is closed.")
            self._num_in_use += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_in_use -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Let transactions that run end, for ten seconds at most, and close every connection.

        Whoever waited for a transaction in another thread may be gone; the transaction is not, and a connection that
        comes back after its pool was given up would stay open.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._num_in_use == 0, _CLOSE_WAIT_S)
            self._is_closed = True
        self._engine.dispose()


def open_database(url: str) -> Database:
    """Open (and create or migrate) the database. Raises StartupError saying what to do."""
    try:
        parsed = make_url(url)
        if parsed.drivername in {"postgres", "postgresql"}:
            parsed = parsed.set(drivername="postgresql+psycopg")
        engine = _sqlite_engine(parsed) if parsed.get_backend_name() == "sqlite" else create_engine(parsed)
    except (ArgumentError, NoSuchModuleError) as error:
        raise StartupError(f"database_url is not usable: {error}. Write sqlite:///PATH or postgresql://…") from error
    except ModuleNotFoundError as error:
        raise StartupError("PostgreSQL needs its driver: pip install 'manylora[postgres]'.") from error
    try:
        _migrate(engine)
    except (SQLAlchemyError, CommandError) as error:
        engine.dispose()
        shown = parsed.render_as_string(hide_password=True)
        raise StartupError(f"The database {shown} cannot be opened: {_reason(error)}") from error
    return Database(engine)


def _reason(error: SQLAlchemyError | CommandError) -> str:
    if isinstance(error, CommandError):  # of alembic: it does not know the revision that the database is at
        return "a newer manylora has changed it. Start that version, or restore a backup from before the upgrade."
    known = database_error(error)
    return known.message if isinstance(known, Unavailable) else cause_of(error)


def _sqlite_engine(url: URL) -> Engine:
    if url.database and url.database != ":memory:":
        folder = Path(url.database).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StartupError(file_error(error, "The database's folder cannot be made").message) from error
    engine = create_engine(url)
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver's own BEGIN comes too late for DDL and for reads
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A deferred transaction that reads and then writes can fail with SQLITE_BUSY at once; IMMEDIATE waits its turn.
    is_write = connection.get_execution_options().get("manylora_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_write else "BEGIN")


def _migrate(engine: Engine) -> None:
    config = Config()
    config.set_main_option("script_location", "manylora.catalog:migrations")
    with engine.execution_options(manylora_write=True).begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:n)"), {"n": _MIGRATION_LOCK})
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
