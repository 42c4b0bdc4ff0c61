"""An empty database of each kind."""

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from manylora.database.database import Database, open_database
from tests.catalog import postgres

from .ledgers import Broken


@pytest.fixture(scope="session")
def shared_postgres_url() -> Iterator[str]:
    programs = postgres.programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian's package postgresql)")
    with postgres.running(programs) as cluster:
        yield cluster.new_database()


@pytest.fixture
def postgres_url(shared_postgres_url: str) -> str:
    """One database for all tests, emptied: making one takes a second and eight megabytes."""
    with psycopg.connect(shared_postgres_url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    return shared_postgres_url


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'usage.sqlite3'}"
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = open_database(database_url)
    yield database
    database.close()


@pytest.fixture
def broken(database: Database) -> Broken:
    return Broken(database._engine)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the ledgers of a test have their journals."""
    monkeypatch.chdir(tmp_path)
    return Path("journals")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
