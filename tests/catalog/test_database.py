"""What the catalog and the tenants rely on in their database."""

import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from manylora.database.database import Database, open_database


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return open_database(f"sqlite:///{tmp_path / 'registry.sqlite3'}")


def test_closing_waits_for_the_transaction_of_another_thread(database: Database) -> None:
    before = database.revision("catalog")
    begun, may_end = threading.Event(), threading.Event()

    def transact() -> int:
        with database.write("catalog"):
            begun.set()
            assert may_end.wait(30)
        return 1

    with ThreadPoolExecutor(2) as threads:
        transaction = threads.submit(transact)
        assert begun.wait(30)
        closing = threads.submit(database.close)
        assert not wait([closing], 0.2).done
        assert database.revision("catalog") == before  # open while it waits
        may_end.set()
        assert transaction.result(30) == 1
        closing.result(30)


def test_a_closed_database_says_so(database: Database) -> None:
    database.close()
    database.close()
    with pytest.raises(RuntimeError, match="closed"):
        database.revision("tenants")
