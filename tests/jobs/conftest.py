"""What the tests of jobs share: settings on a folder of the test's own, databases, and one PostgreSQL for all."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from manylora.database.database import Database, open_database
from manylora.settings import Settings
from tests.catalog import postgres
from tests.catalog.conftest import cluster, s3, s3_server

__all__ = ["cluster", "s3", "s3_server"]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", max_adapter_size=4 * 2**20, max_file_size=2**20)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    url = f"sqlite:///{tmp_path / 'registry.sqlite3'}"
    if request.param == "postgresql":
        running: postgres.Cluster = request.getfixturevalue("cluster")
        url = running.new_database()
    opened = open_database(url)
    yield opened
    opened.close()
