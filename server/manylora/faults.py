"""Where errors of foreign code become ours: the database's drivers, the operating system's files, object stores.

`database_errors` and `file_errors` stand at the border: around every transaction, and around every piece of work on
files. What has its cause outside is told to the caller and the operator in one sentence. What has not (a broken
constraint, a wrong statement) is a bug of ours: a 500 that says nothing of its inside, with its traceback in the log.
"""

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, NotSupportedError, ProgrammingError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from manylora.errors import DatabaseUnavailable, InvalidRequest, ManyloraError, StorageFull, StoreUnavailable

__all__ = [
    "CAUSE_CHARS", "NoAnswer", "cause_of", "database_error", "database_errors", "file_error", "file_errors",
    "is_local", "remote_errors",
]  # fmt: skip

# A cause comes from elsewhere: a driver's message can hold a whole statement.
CAUSE_CHARS: Final = 200
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_DESCRIPTORS: Final = frozenset({errno.EMFILE, errno.ENFILE})
# What SQLite's primary result codes (the low byte of the extended one) ask for.
_SQLITE_CAUSES: Final = {
    sqlite3.SQLITE_BUSY: "another program holds a lock on it; end that program, or wait until it is done",
    sqlite3.SQLITE_LOCKED: "another program holds a lock on it; end that program, or wait until it is done",
    sqlite3.SQLITE_READONLY: "its file may not be written; check the owner and the mode of the file and its folder",
    sqlite3.SQLITE_IOERR: "its disk does not read or write (is it full, or failing?)",
    sqlite3.SQLITE_CORRUPT: "its file is damaged; restore a backup (docs/operations.md)",
    sqlite3.SQLITE_NOTADB: "its file is not a database; restore a backup (docs/operations.md)",
    sqlite3.SQLITE_CANTOPEN: "its file cannot be opened; look at its owner and at the limit on open files",
}
_SQLITE_PRIMARY: Final = 0xFF
_POSTGRES_DISK_FULL: Final = "53100"
# PostgreSQL stores every character but U+0000. Its driver says so before it sends a text, the server of a JSON value.
_POSTGRES_NO_TEXT: Final = "22P05"
_DRIVER_NO_TEXT: Final = "NUL (0x00)"
# Statements that fail because of the database, not of the statement: not allowed, and no such table.
_POSTGRES_OUTSIDE: Final = frozenset({"42501", "42P01"})
_OURS: Final = (DataError, IntegrityError, NotSupportedError, ProgrammingError)


class NoAnswer(Exception):
    """A database that is there and says nothing. Drivers' errors of that kind inherit from it."""


def cause_of(error: BaseException) -> str:
    """The error's own words, in one line of at most `CAUSE_CHARS` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= CAUSE_CHARS else f"{text[:CAUSE_CHARS]}…"


def database_error(error: SQLAlchemyError) -> ManyloraError:
    """What the error means: DatabaseUnavailable, StorageFull, InvalidRequest for a text that cannot be stored.

    Where it is a bug of ours, a plain ManyloraError.
    """
    if isinstance(error, PoolTimeout):
        return DatabaseUnavailable("The database is busy: no connection became free in time. Try again.")
    original = error.orig if isinstance(error, DBAPIError) else None
    if original is None:
        return _bug()
    if isinstance(original, sqlite3.Error):
        return _sqlite_error(original)
    state = getattr(original, "sqlstate", None)
    if state == _POSTGRES_DISK_FULL:
        return _full_database()
    if isinstance(error, DataError) and (state == _POSTGRES_NO_TEXT or _DRIVER_NO_TEXT in str(original)):
        return InvalidRequest("A text of the request holds the character U+0000, which cannot be stored. Leave it out.")
    if isinstance(error, _OURS) and state not in _POSTGRES_OUTSIDE:
        return _bug()
    return DatabaseUnavailable(f"The database cannot be used: {cause_of(original)}")


def _sqlite_error(error: sqlite3.Error) -> ManyloraError:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & _SQLITE_PRIMARY
    if code == sqlite3.SQLITE_FULL:
        return _full_database()
    if code in _SQLITE_CAUSES:
        return DatabaseUnavailable(f"The database cannot be used: {_SQLITE_CAUSES[code]}.")
    if str(error).startswith("no such table"):
        return DatabaseUnavailable(f"The database cannot be used: {cause_of(error)}. Was another one put in its place?")
    return _bug()


def _bug() -> ManyloraError:
    return ManyloraError("The server failed at a statement of its own to the database. The log has the details.")


def _full_database() -> StorageFull:
    return StorageFull("The database cannot be written: its disk is full. Make room and try again.")


@contextmanager
def database_errors() -> Iterator[None]:
    """Raises what `database_error` says for whatever the database's driver raises inside."""
    try:
        yield
    except SQLAlchemyError as error:
        raise database_error(error) from error


def is_local(error: BaseException) -> bool:
    """Whether this machine is short of something, whatever else was going on, such as fetching."""
    return isinstance(error, OSError) and error.errno in _NO_SPACE | _NO_DESCRIPTORS


def file_error(error: OSError, doing: str) -> ManyloraError:
    """What the error means. `doing` is a sentence's beginning, such as "The adapter's files cannot be stored"."""
    if error.errno in _NO_SPACE:
        return StorageFull(f"{doing}: the disk is full, or a quota on it is used up. Make room and try again.")
    if error.errno in _NO_DESCRIPTORS:
        return StoreUnavailable(f"{doing}: too many files and connections are open. Raise the limit (ulimit -n).")
    if error.errno is None:
        return StoreUnavailable(f"{doing}: {cause_of(error)}")
    where = f" ({error.filename})" if error.filename else ""
    return StoreUnavailable(f"{doing}: {os.strerror(error.errno)}{where}")


@contextmanager
def file_errors(doing: str) -> Iterator[None]:
    """Raises StorageFull or StoreUnavailable for an OSError inside."""
    try:
        yield
    except OSError as error:
        raise file_error(error, doing) from error


@contextmanager
def remote_errors(doing: str) -> Iterator[None]:
    """`file_errors` for an object store: its client library has exceptions of its own, and fsspec promises no class."""
    try:
        yield
    except ManyloraError:
        raise
    except OSError as error:
        raise file_error(error, doing) from error
    except Exception as error:
        raise StoreUnavailable(f"{doing}: {cause_of(error)}. Check store_url and its credentials.") from error
