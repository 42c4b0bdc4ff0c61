"""What trainings took: counts that are added to what is there, by whoever comes first and by several at once."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select, text

from manylora.database.database import Database, open_database
from manylora.database.tables import MICROSECONDS, TrainingUsageRow
from manylora.usage.training import add_training, tokens_of_a_day

NOW_US = 1_700_000_000 * MICROSECONDS
PATIENCE_S = 60.0


def test_counts_are_added_to_what_is_there(database: Database) -> None:
    for tenant, tokens in (("acme", 3), ("acme", 4), ("acme", 0), ("other", 5)):
        with database.write(None) as session:
            add_training(session, tenant, "sums", NOW_US, tokens, tokens * 10)
            add_training(session, tenant, "more", NOW_US - 86_400 * MICROSECONDS, tokens, 0)
    with database.read() as session:
        rows = session.execute(select(TrainingUsageRow).where(TrainingUsageRow.adapter == "sums")).scalars()
        assert {(row.tenant, row.tokens, row.microseconds) for row in rows} == {("acme", 7, 70), ("other", 5, 50)}
        assert tokens_of_a_day(session, "acme", NOW_US) == 7


@pytest.mark.slow
def test_two_jobs_begin_a_quarter_at_once(postgres_url: str) -> None:
    database = open_database(postgres_url, timeout_s=PATIENCE_S)

    def second() -> None:
        with database.write(None) as session:
            add_training(session, "acme", "sums", NOW_US, 4, 40)

    with ThreadPoolExecutor(1) as pool:
        with database.write(None) as session:
            add_training(session, "acme", "sums", NOW_US, 3, 30)
            session.flush()
            waiting = pool.submit(second)
            blocked = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
            until = time.monotonic() + PATIENCE_S
            while not session.execute(blocked).scalar_one() and time.monotonic() < until:
                time.sleep(0.01)
            assert not waiting.done()
        waiting.result(PATIENCE_S)
    with database.read() as session:
        row = session.execute(select(TrainingUsageRow)).scalar_one()
        assert (row.tokens, row.microseconds) == (7, 70)
    database.close()
