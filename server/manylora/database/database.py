"""The SQL database behind catalog and tenants: SQLite by default, PostgreSQL by URL, migrated when opened."""

import asyncio
import contextvars
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, TextClause, create_engine, event, select, text, update
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.orm import Session

from manylora.database.sqlite_journal import check_journal
from manylora.database.tables import RevisionRow
from manylora.errors import DatabaseUnavailable, StartupError, Unavailable, quoted
from manylora.faults import NoAnswer, cause_of, database_error, database_errors, file_error
from manylora.packages import install_command

Topic = Literal["catalog", "tenants"]
R = TypeVar("R")

# How long a lock that another program holds is waited for. Servers' own transactions take milliseconds.
_BUSY_TIMEOUT_MS: Final = 5_000
_CLOSE_WAIT_S: Final = 10.0
TIMEOUT_S: Final = 5.0
_LONG: Final = 12  # times as long, for what reads whole tables, and for locks that others hold while they store files
_LOCK_POLL_S: Final = 0.05
_NUM_THREADS: Final = 8
_TRY_EVERY_S: Final = 0.5
# Another server that migrates the same database, or a migration of large tables.
_MIGRATION_TIMEOUT_S: Final = 3600.0
# Any fixed number: two processes that migrate the same PostgreSQL database take turns on it.
_MIGRATION_LOCK: Final = 7_217_001
_log = logging.getLogger(__name__)


class Database:
    """Transactions over one database. Thread-safe; `close` returns the connections.

    Where one waits for an answer in vain, those that come after it fail at once, but for one at a time that tries: so a
    database that hangs holds up nobody twice.
    """

    def __init__(self, engine: Engine, lock_engine: Engine | None = None, timeout_s: float = TIMEOUT_S) -> None:
        self._engine = engine
        self._lock_engine = lock_engine
        self._timeout_s = timeout_s
        self._writing = engine.execution_options(manylora_write=True)
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="database")
        self._num_in_use = 0
        self._is_closed = False
        self._is_silent = False
        self._is_tried = False  # somebody waits for the silence to end
        self._try_at = 0.0
        self._is_down = False
        self._changed = threading.Condition()

    @property
    def is_sqlite(self) -> bool:
        return self._engine.dialect.name == "sqlite"

    async def run(self, query: Callable[[], R]) -> R:
        """Run what blocks on a thread of the database's own, so that one that hangs takes none from other work."""
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._threads, context.run, query)

    def listening(self, channels: Sequence[str]) -> AbstractAsyncContextManager[AsyncIterator[str]]:
        """The channels that PostgreSQL tells of, on a connection of its own. Raises ConnectionError."""
        from manylora.database.postgresql import listening

        return listening(self._engine, channels, self._timeout_s)

    @contextmanager
    def read(self, *, is_long: bool = False) -> Iterator[Session]:
        """One consistent view; nothing is written. `is_long` has twelve times the time. Raises DatabaseUnavailable."""
        with (
            self._in_use(),
            Session(self._engine) as session,
            session.begin(),
            self._more_time(session) if is_long else nullcontext(),
        ):
            yield session

    @contextmanager
    def write(self, topic: Topic | None) -> Iterator[Session]:
        """One transaction that is wholly there, on disk, once the block has ended, or not at all.

        With a `topic`, its revision is raised first: on PostgreSQL that row's lock puts the topic's writers in
        one order, on SQLite `BEGIN IMMEDIATE` does. Raises DatabaseUnavailable or StorageFull.
        """
        with self._in_use(), Session(self._writing, expire_on_commit=False) as session, session.begin():
            if topic is not None:
                raised = update(RevisionRow).where(RevisionRow.topic == topic)
                session.execute(raised.values(value=RevisionRow.value + 1, noted=RevisionRow.noted + 1))
            yield session
            if topic is not None and not self.is_sqlite:
                session.execute(tell(topic))

    @contextmanager
    def _more_time(self, session: Session) -> Iterator[None]:
        if self.is_sqlite:
            yield
            return
        driver: Any = session.connection().connection.driver_connection
        limit_s = _LONG * self._timeout_s
        driver.timeout_s = limit_s
        try:
            session.execute(text(f"SET LOCAL statement_timeout = {round(2000 * limit_s)}"))
            yield
        finally:
            driver.timeout_s = self._timeout_s

    def revision(self, topic: Topic) -> int:
        """A number that grows with every change to the topic, by whichever process."""
        with self.read() as session:
            return revision_in(session, topic)

    def traced_revision(self, topic: Topic) -> tuple[int, int]:
        """The revision, and how far it has gone without a trace in the rows of what changed."""
        with self.read() as session:
            return traced_revision_in(session, topic)

    @contextmanager
    def named_lock(self, number: int) -> Iterator[None]:
        """Exclude other processes that hold the same 63-bit number, where several can share the database.

        A SQLite database has one server (see `catalog.files`), so there is nobody to exclude.
        """
        if self.is_sqlite:
            yield
            return
        assert self._lock_engine is not None
        with self._in_use(), self._lock_engine.connect() as connection:
            self._take(connection, number)
            self._note(None, is_silent=False)  # or else nobody would be let in beside this one
            try:
                yield
            finally:
                try:
                    connection.execute(text("SELECT pg_advisory_unlock(:n)"), {"n": number})
                except SQLAlchemyError:
                    connection.invalidate()  # the lock goes with the connection, and what was done under it stands

    def _take(self, connection: Connection, number: int) -> None:
        # Asked for again and again: whoever holds it may be storing a large adapter, and a statement that waits would
        # look like a database that does not answer.
        deadline = time.monotonic() + _LONG * self._timeout_s
        while not connection.execute(text("SELECT pg_try_advisory_lock(:n)"), {"n": number}).scalar_one():
            connection.rollback()
            if time.monotonic() > deadline:
                raise Unavailable("Another server is working on the same adapter. Try again.")
            time.sleep(_LOCK_POLL_S)

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        is_trying = self._enter()
        fault: DBAPIError | None = None
        try:
            with database_errors():
                try:
                    yield
                except DBAPIError as error:
                    fault = error
                    raise
        except DatabaseUnavailable as error:
            # Without a fault of its own it comes from a transaction inside this one, which was noted there.
            self._note(error, is_silent=self._is_silent if fault is None else isinstance(fault.orig, NoAnswer))
            raise
        except BaseException:
            self._note(None, is_silent=False)
            raise
        else:
            self._note(None, is_silent=False)
        finally:
            with self._changed:
                self._is_tried &= not is_trying
                self._num_in_use -= 1
                self._changed.notify_all()

    def _enter(self) -> bool:
        with self._changed:
            if self._is_closed:
                raise RuntimeError("The database is closed.")
            if self._is_silent and (self._is_tried or time.monotonic() < self._try_at):
                raise DatabaseUnavailable("The database does not answer. Try again later.")
            is_trying = self._is_silent
            self._is_tried |= is_trying
            self._num_in_use += 1
            return is_trying

    def _note(self, error: DatabaseUnavailable | None, *, is_silent: bool) -> None:
        """Log that the database is away, once each time, and that it is back."""
        with self._changed:
            was_down, self._is_down = self._is_down, error is not None
            self._is_silent = is_silent
            self._try_at = time.monotonic() + _TRY_EVERY_S
        if error is not None and not was_down:
            _log.error("%s Answers go on; keys, quotas and adapters stay as they are until it is back.", error.message)
        elif error is None and was_down:
            _log.warning("The database answers again.")

    def close(self) -> None:
        """Let transactions that run end, for ten seconds at most, and close every connection.

        Whoever waited for a transaction in another thread may be gone; the transaction is not, and a connection that
        comes back after its pool was given up would stay open.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._num_in_use == 0, _CLOSE_WAIT_S)
            self._is_closed = True
        self._threads.shutdown(wait=False)
        for engine in (self._engine, self._lock_engine):
            if engine is not None:
                engine.dispose()


def tell(topic: Topic) -> TextClause:
    """What makes PostgreSQL tell whoever listens (`database.notices`) of the topic, once the transaction has ended."""
    return text("SELECT pg_notify(:channel, '')").bindparams(channel=channel_of(topic))


def channel_of(topic: Topic) -> str:
    return f"manylora_{topic}"


def revision_in(session: Session, topic: Topic) -> int:
    """The topic's revision as a transaction sees it; a writing one sees the revision that it makes."""
    return session.execute(select(RevisionRow.value).where(RevisionRow.topic == topic)).scalar_one()


def traced_revision_in(session: Session, topic: Topic) -> tuple[int, int]:
    """The topic's revision as a transaction sees it, and how far it has gone without a trace in rows.

    Where the second number is another than before, an older version of the server or a hand has changed rows that do
    not say so, and only reading all of them shows which.
    """
    query = select(RevisionRow.value, RevisionRow.value - RevisionRow.noted).where(RevisionRow.topic == topic)
    value, num_untraced = session.execute(query).one()
    return value, num_untraced


def check_exists(url: str) -> None:
    """Refuse a SQLite file that does not exist, which opening would make, empty.

    Raises StartupError where a SQLite file is not there; what else is wrong with the URL, `open_database` says.
    """
    with suppress(ArgumentError):
        parsed = make_url(url)
        is_file = parsed.get_backend_name() == "sqlite" and parsed.database not in (None, "", ":memory:")
        if is_file and not Path(str(parsed.database)).exists():
            raise StartupError(
                f"There is no database {quoted(str(parsed.database))}: name the server's own data folder or database. "
                "If it was lost, `manylora adapters rescan` makes one again from the store."
            )


def open_database(url: str, timeout_s: float = TIMEOUT_S) -> Database:
    """Open (and create or migrate) the database. Raises StartupError saying what to do.

    `timeout_s`: how long PostgreSQL may be silent, a lock or a connection be waited for.
    """
    try:
        parsed = make_url(url)
        if parsed.drivername in {"postgres", "postgresql"}:
            parsed = parsed.set(drivername="postgresql+psycopg")
        engines = _sqlite_engines(parsed) if parsed.get_backend_name() == "sqlite" else _engines(parsed, timeout_s)
    except (ArgumentError, NoSuchModuleError) as error:
        raise StartupError(f"database_url is not usable: {error}. Write sqlite:///PATH or postgresql://…") from error
    except ModuleNotFoundError as error:
        raise StartupError(f"PostgreSQL needs its driver. Install it with: {install_command('psycopg')}") from error
    database = Database(engines[0], engines[1], timeout_s)
    try:
        _migrate(engines[0])
    except (SQLAlchemyError, CommandError) as error:
        database.close()
        shown = parsed.render_as_string(hide_password=True)
        raise StartupError(f"The database {shown} cannot be opened: {_reason(error)}") from error
    return database


def _engines(url: URL, timeout_s: float) -> tuple[Engine, Engine]:
    """Two engines, for transactions and for locks: a holder of a lock needs a transaction, so they share no pool."""
    from manylora.database.postgresql import connect_in_time

    common: dict[str, Any] = {"pool_pre_ping": True}
    engine = create_engine(url, pool_size=4, max_overflow=4, pool_timeout=timeout_s, **common)
    locks = create_engine(url, pool_size=1, max_overflow=3, pool_timeout=_LONG * timeout_s, **common)
    for each in (engine, locks):
        connect_in_time(each, timeout_s)
    return engine, locks


def _reason(error: SQLAlchemyError | CommandError) -> str:
    if isinstance(error, CommandError):  # of alembic: it does not know the revision that the database is at
        return "a newer manylora has changed it. Start that version, or restore a backup from before the upgrade."
    known = database_error(error)
    return known.message if isinstance(known, Unavailable) else cause_of(error)


def _sqlite_engines(url: URL) -> tuple[Engine, None]:
    if url.database and url.database != ":memory:":
        folder = Path(url.database).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StartupError(file_error(error, "The database's folder cannot be made").message) from error
        check_journal(Path(url.database))
    engine = create_engine(url)
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine, None


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
    config.set_main_option("script_location", "manylora.database:migrations")
    with engine.execution_options(manylora_write=True).begin() as connection:
        if engine.dialect.name == "postgresql":
            driver: Any = connection.connection.driver_connection
            driver.timeout_s = _MIGRATION_TIMEOUT_S
            connection.execute(text("SET LOCAL statement_timeout = 0"))
            connection.execute(text("SET LOCAL lock_timeout = 0"))
            connection.execute(text("SELECT pg_advisory_xact_lock(:n)"), {"n": _MIGRATION_LOCK})
            connection.detach()  # its time-outs are not those of the pool's
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
