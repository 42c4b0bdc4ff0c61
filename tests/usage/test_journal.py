"""What the database does not take is in a journal on this machine's disk, and comes from there."""

import asyncio
import dataclasses
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from manylora.database.database import Database, Topic
from manylora.database.tables import CanaryCountRow
from manylora.usage.journal import journal_of, read_journal
from manylora.usage.store import Batch

from .ledgers import QUARTER, Broken, Clock, killed, ledger_of, rows, taken_over, use

pytestmark = pytest.mark.anyio


async def test_what_the_database_did_not_take_is_in_the_journal_when_it_is_said_to_be_stored(
    broken: Broken, folder: Path
) -> None:
    ledger = ledger_of(broken, Clock())
    broken.is_down = True
    for tokens in range(5):
        ledger.add(use(tokens=tokens))
        await ledger.stored()
    killed(ledger)
    assert rows(broken) == []
    broken.is_down = False
    await taken_over(ledger_of(broken, Clock()), folder)
    assert [(row[5], row[7]) for row in rows(broken)] == [(5, 10)]


async def test_a_server_that_ends_while_the_database_is_down_leaves_its_journal_to_the_next(
    broken: Broken, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = ledger_of(broken, Clock())
    broken.is_down = True
    ledger.add(use())
    await ledger.aclose()
    assert "lost" not in caplog.text
    broken.is_down = False
    await taken_over(ledger_of(broken, Clock()), folder)
    assert rows(broken)[0][5] == 1


async def test_what_had_been_written_after_all_is_not_written_again_from_the_journal(
    broken: Broken, folder: Path
) -> None:
    ledger = ledger_of(broken, Clock())
    broken.is_mute = True
    for _ in range(3):
        ledger.add(use())
        await ledger.stored()
    killed(ledger)
    broken.is_mute = False
    await taken_over(ledger_of(broken, Clock()), folder)
    assert rows(broken)[0][5] == 3


async def test_nobody_waits_longer_than_wait_s_and_nobody_twice(database: Database, folder: Path) -> None:
    gate = threading.Event()

    class Hanging(Database):
        @contextmanager
        def write(self, topic: Topic | None) -> Iterator[Session]:
            assert gate.wait(60)
            with super().write(topic) as session:
                yield session

    ledger = ledger_of(Hanging(database._engine), Clock(), wait_s=0.05)
    async with asyncio.timeout(20):
        for _ in range(1000):  # 50 s if each waited
            ledger.add(use())
            await ledger.stored()
    assert rows(database) == []
    held = [batch for path in folder.iterdir() for _, batch in read_journal(path)]
    assert sum(batch.num_requests for batch in held) == 1000
    gate.set()
    await ledger.aclose()
    assert rows(database)[0][5] == 1000
    assert list(folder.iterdir()) == []


async def test_a_journal_that_grows_is_written_anew_with_the_same_sums(
    broken: Broken, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manylora.usage.ledger._COMPACT_BYTES", 2000)
    ledger = ledger_of(broken, Clock())
    broken.is_down = True
    for _ in range(100):
        ledger.add(use())
        await ledger.stored()
    (path,) = folder.iterdir()
    assert path.stat().st_size < 4000
    killed(ledger)
    broken.is_down = False
    await taken_over(ledger_of(broken, Clock()), folder)
    assert rows(broken)[0][5] == 100


async def test_a_journal_that_could_not_be_written_for_a_while_has_everything_once_it_can(
    broken: Broken, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_text("in the way")
    ledger = ledger_of(broken, Clock())
    broken.is_down = True
    for _ in range(3):
        ledger.add(use())
        await ledger.stored()
    assert caplog.text.count("The usage journal fails too") == 1
    folder.unlink()
    ledger.add(use())
    await ledger.stored()
    killed(ledger)
    broken.is_down = False
    await taken_over(ledger_of(broken, Clock()), folder)
    assert rows(broken)[0][5] == 4


def test_a_line_that_was_cut_off_is_left_out_and_a_spoiled_one_is_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = journal_of(folder, "w")
    for number in (1, 2, 3):
        journal.append([(number, Batch(usage={(QUARTER, "acme", "", "", "ok"): [number, 0, 0, 0]}))])
    whole = journal.path.read_bytes()
    assert [number for number, _ in read_journal(journal.path)] == [1, 2, 3]
    journal.path.write_bytes(whole[:-5])
    assert [number for number, _ in read_journal(journal.path)] == [1, 2]
    assert caplog.text == ""
    journal.path.write_bytes(whole.replace(b'{"batch": 2', b'{"botch": 2'))
    assert [number for number, _ in read_journal(journal.path)] == [1, 3]
    assert "Line 2" in caplog.text


def test_an_append_that_fails_leaves_the_journal_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = journal_of(folder, "w")
    batch = Batch(usage={(QUARTER, "acme", "", "", "ok"): [1, 0, 0, 0]})
    journal.append([(1, batch)])
    before = journal.path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("no space")))
        with pytest.raises(OSError, match="no space"):
            journal.append([(2, batch)])
    assert journal.path.read_bytes() == before
    journal.append([(2, batch)])
    assert [number for number, _ in read_journal(journal.path)] == [1, 2]


async def test_what_a_canary_decided_on_is_counted_once_whatever_was_killed(broken: Broken, folder: Path) -> None:
    ledger = ledger_of(broken, Clock())
    broken.is_down = True
    tried = dataclasses.replace(use(tokens=5), canary="canary_1", ttft_s=0.25)  # type: ignore[type-var]
    for _ in range(3):
        ledger.add(tried)
        await ledger.stored()
    killed(ledger)
    broken.is_down = False
    await taken_over(ledger_of(broken, Clock()), folder)
    with broken.read() as session:
        [row] = session.execute(select(CanaryCountRow)).scalars()
        assert (row.canary, row.version, row.outcome) == ("canary_1", 3, "ok")
        assert (row.requests, row.prompt_tokens, row.completion_tokens, row.cached_tokens) == (3, 30, 15, 3)
        assert (row.first_tokens, row.ttft_us) == (3, 750_000)
    assert rows(broken)[0][5] == 3, "beside what everybody's usage has"
