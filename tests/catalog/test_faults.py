"""What the database's driver and the operating system say becomes one sentence of ours, in one place."""

import ast
import errno
import re
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from fsspec.registry import _registry
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from manylora.catalog.store import check_reachable
from manylora.database import database as database_module
from manylora.database.database import Database, open_database
from manylora.errors import DatabaseUnavailable, ManyloraError, StartupError, StorageFull, StoreUnavailable
from manylora.faults import CAUSE_CHARS, cause_of, database_error, file_error, file_errors

SERVER = Path(__file__).parents[2] / "server" / "manylora"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "registry.sqlite3"


@pytest.fixture
def database(file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    monkeypatch.setattr(database_module, "_BUSY_TIMEOUT_MS", 50)
    opened = open_database(f"sqlite:///{file}")
    yield opened
    opened.close()


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Another program in the middle of a transaction."""
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def sentence(error: ManyloraError) -> str:
    assert "\n" not in error.message
    assert "sqlalche.me" not in error.message
    assert "SELECT" not in error.message
    return error.message


def test_a_database_locked_by_another_program_is_unavailable(database: Database, file: Path) -> None:
    with locked(file), pytest.raises(DatabaseUnavailable) as caught, database.write("catalog"):
        pytest.fail("the transaction began")
    assert "another program holds a lock" in sentence(caught.value)
    with database.write("catalog"):
        pass


def test_a_locked_database_is_one_sentence_at_start(
    database: Database, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with locked(file), pytest.raises(StartupError) as caught:
        open_database(f"sqlite:///{file}")
    assert "another program holds a lock" in sentence(caught.value)


def test_a_damaged_page_is_one_sentence(file: Path) -> None:
    open_database(f"sqlite:///{file}").close()
    page = 4096
    data = bytearray(file.read_bytes())
    data[page:] = b"\xa5" * (len(data) - page)  # the first page, with the schema's root, is sound
    file.write_bytes(data)
    with pytest.raises(StartupError) as caught:
        open_database(f"sqlite:///{file}")
    assert "its file is damaged" in sentence(caught.value)


def test_a_file_that_is_no_database_is_one_sentence(file: Path) -> None:
    file.write_bytes(b"all work and no play " * 500)
    with pytest.raises(StartupError) as caught:
        open_database(f"sqlite:///{file}")
    assert "not a database" in sentence(caught.value)


def test_a_database_of_a_newer_program_is_one_sentence(database: Database, file: Path) -> None:
    with database.write(None) as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StartupError) as caught:
        open_database(f"sqlite:///{file}")
    assert "a newer manylora" in sentence(caught.value)


def test_a_database_put_away_while_the_server_runs_is_unavailable(database: Database, file: Path) -> None:
    with database.write(None) as session:
        session.execute(text("DROP TABLE revisions"))
    with pytest.raises(DatabaseUnavailable, match="no such table"):
        database.revision("catalog")


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match="folder cannot be made"):
        open_database(f"sqlite:///{tmp_path}/file/registry.sqlite3")


@pytest.mark.parametrize(("url", "package"), [("gs://bucket/adapters", "gcsfs"), ("s3://bucket/adapters", "s3fs")])
def test_a_store_without_its_package_is_told_which_one(url: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(_registry, url.partition("://")[0], raising=False)  # what an earlier test has loaded
    with pytest.raises(StartupError) as caught:
        check_reachable(url)
    assert re.search(rf"Install it with: .*-m pip install '?{package}\b", caught.value.message)


def _with(kind: type[DBAPIError], original: BaseException) -> DBAPIError:
    return kind("INSERT INTO keys VALUES (:secret)", {"secret": "x" * 5000}, original)


def _sqlite(code: int) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("something")
    error.sqlite_errorcode = code
    return error


class _Postgres(Exception):
    def __init__(self, state: str) -> None:
        super().__init__("terminating connection " + "because " * 200)
        self.sqlstate = state


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (_with(OperationalError, _sqlite(sqlite3.SQLITE_FULL)), StorageFull),
        (_with(OperationalError, _sqlite(sqlite3.SQLITE_IOERR_WRITE)), DatabaseUnavailable),
        (_with(OperationalError, _sqlite(sqlite3.SQLITE_BUSY_SNAPSHOT)), DatabaseUnavailable),
        (_with(OperationalError, _sqlite(sqlite3.SQLITE_READONLY)), DatabaseUnavailable),
        (_with(OperationalError, _sqlite(sqlite3.SQLITE_CANTOPEN)), DatabaseUnavailable),
        (_with(OperationalError, _Postgres("57P01")), DatabaseUnavailable),
        (_with(OperationalError, _Postgres("53100")), StorageFull),
        (_with(ProgrammingError, _Postgres("42501")), DatabaseUnavailable),
        (PoolTimeout("QueuePool limit of size 5 overflow 10 reached"), DatabaseUnavailable),
        (_with(IntegrityError, sqlite3.IntegrityError("UNIQUE constraint failed")), ManyloraError),
        (_with(ProgrammingError, _Postgres("42601")), ManyloraError),
        (_with(OperationalError, _sqlite(sqlite3.SQLITE_ERROR)), ManyloraError),
    ],
)
def test_every_kind_of_database_error_has_a_meaning(error: DBAPIError, expected: type[ManyloraError]) -> None:
    known = database_error(error)
    assert type(known) is expected
    assert len(sentence(known)) < CAUSE_CHARS + 100
    assert "xxxx" not in known.message


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_every_error_of_the_system_has_a_meaning(number: int) -> None:
    known = file_error(OSError(number, "whatever", "/data/store"), "The adapter's files cannot be stored")
    is_full = number in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    assert type(known) is (StorageFull if is_full else StoreUnavailable)
    assert sentence(known).startswith("The adapter's files cannot be stored: ")


def test_a_full_device_is_storage_full() -> None:
    with pytest.raises(StorageFull), file_errors("It cannot be written"), open("/dev/full", "wb") as file:  # noqa: PTH123
        file.write(b"x" * 100_000)


def test_a_cause_is_one_short_line() -> None:
    assert cause_of(ValueError("a\n  b")) == "a b"
    assert cause_of(ValueError()) == "ValueError"
    assert len(cause_of(ValueError("x" * 10_000))) == CAUSE_CHARS + 1


def test_no_other_module_knows_the_errors_of_the_database() -> None:
    """Whoever catches them elsewhere misses what `Database` has made of them."""
    allowed = {"faults.py", "database/database.py", "database/postgresql.py"}
    found = set()
    for path in SERVER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(re.fullmatch(r"sqlalchemy\.exc|sqlite3|psycopg(\..*)?|alembic\.util", name) for name in names):
                found.add(str(path.relative_to(SERVER)))
    assert found == allowed
