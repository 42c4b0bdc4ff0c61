"""A PostgreSQL that is dead, silent or shared: what callers are told, how long they wait, and what is kept."""

import asyncio
import logging
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from manylora.database.database import Database, open_database
from manylora.errors import DatabaseUnavailable, StartupError
from manylora.settings import Settings
from manylora.tenants.gate import TenantGate
from manylora.tenants.interface import Role
from manylora.tenants.keys import KeyStore

from . import postgres
from .rig import Rig, running, sound_files

pytestmark = [pytest.mark.anyio, pytest.mark.slow]
TIMEOUT_S = 1.0
# Nobody waits twice; the rest is room for a busy machine, and far from waiting for ever.
PATIENCE_S = 30.0


@pytest.fixture
def settings(cluster: postgres.Cluster, tmp_path: Path) -> Settings:
    return Settings(
        data_dir=tmp_path / "data",
        database_url=cluster.new_database(),
        database_timeout_s=TIMEOUT_S,
        max_adapter_size=4 * 2**20,
    )


def administrative_calls(rig: Rig) -> dict[str, Any]:
    """Every route that needs the database."""
    return {
        "list": rig.call("GET", "/v1/adapters"),
        "show": rig.call("GET", "/v1/adapters/x"),
        "download": rig.call("GET", "/v1/adapters/x/versions/1/download"),
        "upload": rig.push("y", sound_files(3.0)),
        "promote": rig.call("PATCH", "/v1/adapters/x", json={"active_version": 1}),
        "delete": rig.call("DELETE", "/v1/adapters/x/versions/1"),
        "usage": rig.call("GET", "/v1/usage"),
    }


async def assert_unavailable(rig: Rig) -> None:
    calls = administrative_calls(rig)
    async with asyncio.timeout(PATIENCE_S):
        answers = dict(zip(calls, await asyncio.gather(*calls.values()), strict=True))
    for name, answer in answers.items():
        assert answer.status_code == 503, (name, answer.text)
        assert answer.json()["error"]["code"] == "database_unavailable", name
        assert int(answer.headers["retry-after"]) >= 1, name


async def until_available(rig: Rig) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while (await rig.call("GET", "/v1/adapters")).status_code == 503:
            await asyncio.sleep(0.05)


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Rig]:
    async with running(settings) as rig:
        for seed in (1.0, 2.0):
            await rig.push("x", sound_files(seed), activate="true")
        yield rig


async def test_a_dead_database_is_503_until_it_is_back(
    settings: Settings, cluster: postgres.Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "manylora.database.database")
    async with serving(settings) as rig:
        rig.gate.start()
        cluster.kill()
        try:
            await assert_unavailable(rig)
            await rig.assert_answers()
            await asyncio.sleep(2.5)  # the watchers look more than once
            await assert_unavailable(rig)
        finally:
            cluster.start()
        await until_available(rig)
        assert (await rig.call("GET", "/v1/adapters/x")).json()["active_version"] == 2
        assert (await rig.push("y", sound_files(3.0))).status_code == 201
        rig.catalog.check_integrity()
    said = [record for record in caplog.records if record.name == "manylora.database.database"]
    assert [record.levelname for record in said] == ["ERROR", "WARNING"]
    assert not any(record.exc_info for record in caplog.records)


def ask_often(database: Database) -> None:
    """A thousand transactions, each of which would wait for a second."""
    for _ in range(1000):
        with suppress(DatabaseUnavailable):
            database.revision("catalog")


async def test_a_silent_database_is_503_within_its_timeout_and_holds_up_nobody_twice(
    settings: Settings, cluster: postgres.Cluster
) -> None:
    async with serving(settings) as rig:
        rig.gate.start()
        with cluster.paused():
            await assert_unavailable(rig)
            await rig.assert_answers()
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.to_thread(ask_often, rig.catalog.database)
            await assert_unavailable(rig)
        await until_available(rig)
        assert (await rig.push("y", sound_files(3.0))).status_code == 201
        rig.catalog.check_integrity()


async def test_other_work_goes_on_while_queries_hang(settings: Settings, cluster: postgres.Cluster) -> None:
    async with serving(settings) as rig:
        with cluster.paused():
            hanging = [asyncio.create_task(rig.call("GET", "/v1/adapters")) for _ in range(50)]
            await asyncio.sleep(0)
            async with asyncio.timeout(TIMEOUT_S / 2):
                await asyncio.gather(*(asyncio.to_thread(int) for _ in range(50)))
            assert {(await each).status_code for each in hanging} == {503}


def test_a_silent_database_at_start_is_one_line(settings: Settings, cluster: postgres.Cluster) -> None:
    with cluster.paused(), pytest.raises(StartupError, match="cannot be opened") as caught:
        open_database(settings.resolved_database_url, TIMEOUT_S)
    assert "\n" not in caught.value.message


def test_a_lock_that_another_server_holds_for_long_is_waited_for(settings: Settings) -> None:
    first, second = (open_database(settings.resolved_database_url, TIMEOUT_S) for _ in range(2))
    order = []

    def take() -> None:
        with second.named_lock(7):
            order.append("second")

    async def both() -> None:
        with first.named_lock(7):
            waiting = asyncio.create_task(asyncio.to_thread(take))
            await asyncio.sleep(2 * TIMEOUT_S)
            order.append("first")
        await waiting

    asyncio.run(both())
    assert order == ["first", "second"]
    first.close()
    second.close()


def test_many_locks_at_once_leave_connections_for_what_is_done_under_them(settings: Settings) -> None:
    database = open_database(settings.resolved_database_url, TIMEOUT_S)

    def store(number: int) -> int:
        with database.named_lock(number):
            time.sleep(0.1)
            return database.revision("catalog")

    async def all_of_them() -> list[int]:
        return await asyncio.gather(*(asyncio.to_thread(store, number) for number in range(30)))

    assert len(asyncio.run(all_of_them())) == 30
    database.close()


async def test_two_servers_that_write_when_the_same_keys_were_used_never_block_each_other(settings: Settings) -> None:
    databases = [open_database(settings.resolved_database_url, TIMEOUT_S) for _ in range(2)]
    ids = [KeyStore(databases[0]).create("acme", Role.USER)[0].id for _ in range(200)]

    def note(database: Database, order: int, at: int) -> None:
        for turn in range(10):
            KeyStore(database).note_used(dict.fromkeys(ids[::order], at + turn))

    await asyncio.gather(
        asyncio.to_thread(note, databases[0], 1, 1_000), asyncio.to_thread(note, databases[1], -1, 2_000)
    )
    assert {key.last_used for key in KeyStore(databases[0]).list()} == {2_009}  # the later one, whoever came last
    for database in databases:
        database.close()


async def test_times_of_use_that_could_not_be_written_are_kept(settings: Settings, cluster: postgres.Cluster) -> None:
    database = open_database(settings.resolved_database_url, TIMEOUT_S)
    _, text = KeyStore(database).create("acme", Role.USER)
    gate = TenantGate(database)
    gate.authenticate(f"Bearer {text}")
    with cluster.paused(), pytest.raises(DatabaseUnavailable):
        await gate._flush()
    await asyncio.sleep(TIMEOUT_S)
    await gate.aclose()
    assert KeyStore(database).list()[0].last_used is not None
    database.close()


async def requests_on_the_bill(rig: Rig) -> int:
    answer = (await rig.call("GET", "/v1/usage")).json()
    return int(answer["total"]["requests"])


@pytest.mark.parametrize("how", ["paused", "killed"])
async def test_usage_is_exact_after_an_outage(settings: Settings, cluster: postgres.Cluster, how: str) -> None:
    async with serving(settings.model_copy(update={"usage_wait_s": 0.1})) as rig:
        for _ in range(3):
            await rig.assert_answers()
        async with asyncio.timeout(PATIENCE_S):
            with cluster.paused() if how == "paused" else dead(cluster):
                for _ in range(20):
                    await rig.assert_answers()
        for _ in range(3):
            await rig.assert_answers()
        await until_available(rig)
        async with asyncio.timeout(PATIENCE_S):
            while await requests_on_the_bill(rig) < 26:
                await asyncio.sleep(0.05)
        assert await requests_on_the_bill(rig) == 26


@contextmanager
def dead(cluster: postgres.Cluster) -> Iterator[None]:
    cluster.kill()
    try:
        yield
    finally:
        cluster.start()


CHILD = """
import asyncio, sys
from pathlib import Path
from manylora.database.database import open_database
from manylora.api.record import RequestRecord
from manylora.usage.ledger import UsageLedger
from manylora.lora.memory.occupancy import Occupancy

async def main(url, folder):
    ledger = UsageLedger(open_database(url, 1.0), Occupancy(), Path(folder), wait_s=0.1)
    ledger.start()
    for line in sys.stdin:
        ledger.add(RequestRecord("r", "acme", None, "ok", 0.0, 0.0, prompt_tokens=1, completion_tokens=2))
        await ledger.stored()
        sys.stdout.write("kept\\n")
        sys.stdout.flush()

asyncio.run(main(*sys.argv[1:]))
"""


async def test_kill_9_while_the_database_hangs_takes_nothing_off_the_bill(
    settings: Settings, cluster: postgres.Cluster
) -> None:
    url, folder = settings.resolved_database_url, settings.data_dir / "usage"
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, url, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        for turn in range(12):
            with cluster.paused() if turn % 2 else nullcontext():
                child.stdin.write("one\n")
                child.stdin.flush()
                assert child.stdout.readline() == "kept\n"
        with cluster.paused():
            child.stdin.write("one\n")
            child.stdin.flush()
            assert child.stdout.readline() == "kept\n"
            child.kill()
            child.wait()
    async with running(settings) as rig, asyncio.timeout(PATIENCE_S):
        while await requests_on_the_bill(rig) < 13:
            await asyncio.sleep(0.05)
        assert await requests_on_the_bill(rig) == 13
    assert list(folder.iterdir()) == []
