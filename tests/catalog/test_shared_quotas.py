"""Quotas of several servers on one PostgreSQL database: together they let through what one alone would."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from manylora.database.database import Database, open_database
from manylora.database.replicas import Replicas
from manylora.errors import QuotaExceeded
from manylora.tenants.buckets import SharedBuckets
from manylora.tenants.interface import Lease
from manylora.tenants.limits import TenantLimits
from manylora.tenants.quotas import Kind, Quotas
from manylora.tenants.shared_quotas import SharedQuotas

from . import postgres

pytestmark = [pytest.mark.anyio, pytest.mark.slow]
PATIENCE_S = 60.0


@pytest.fixture
def database(cluster: postgres.Cluster) -> Iterator[Database]:
    database = open_database(cluster.new_database(), 1.0)
    yield database
    database.close()


class Server:
    """One server's quotas; `num_fallbacks` counts requests that the database was not asked for."""

    def __init__(self, database: Database, limits: TenantLimits) -> None:
        local = Quotas(time.monotonic)
        local.set_limits({"acme": limits})
        self.replicas = Replicas(database, "base")
        self.replicas.join(0)
        self.num_fallbacks = 0
        self.ahead_s = 0.0
        self.buckets = SharedBuckets(database, self.replicas)
        self.quotas = SharedQuotas(database, self.buckets, local, clock=self._now, count_fallback=self._count)

    def _now(self) -> float:
        return time.monotonic() + self.ahead_s

    def _count(self) -> None:
        self.num_fallbacks += 1

    async def admitted(self, tokens: int = 1) -> Lease | None:
        try:
            return await self.quotas.admit("acme", tokens)
        except QuotaExceeded:
            return None


@asynccontextmanager
async def servers(database: Database, num: int, **limits: int) -> AsyncIterator[list[Server]]:
    async with AsyncExitStack() as stack:
        made = [Server(database, TenantLimits(**limits)) for _ in range(num)]
        for each in made:
            each.replicas.beat(0)  # each knows of all
            each.quotas.start()
            stack.push_async_callback(each.quotas.aclose)
        yield made


async def until(is_so: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await is_so():
            await asyncio.sleep(0.01)


async def test_three_servers_let_through_one_quota_of_requests(database: Database) -> None:
    async with servers(database, 3, requests_per_minute=600) as three:
        began = time.monotonic()

        async def until_refused(server: Server) -> int:
            granted = 0
            while await server.admitted() is not None:
                granted += 1
            return granted

        granted = sum(await asyncio.gather(*(until_refused(server) for server in three for _ in range(4))))
        allowed = 600 + 10 * (time.monotonic() - began)
        assert 0.98 * 600 <= granted <= 1.02 * allowed
        assert [server.num_fallbacks for server in three] == [0, 0, 0]


async def test_tokens_that_were_charged_and_not_used_are_everybodys(database: Database) -> None:
    async with servers(database, 2, tokens_per_minute=600) as (a, b):
        first = await a.admitted(600)
        assert first is not None
        assert await b.admitted(300) is None
        first.settle(5, 5)

        async def answers() -> bool:
            return await b.admitted(300) is not None

        await until(answers)
        for server in (a, b):
            server.quotas.check_integrity()


async def test_a_request_of_more_than_a_minutes_worth_leaves_everybody_in_debt(database: Database) -> None:
    async with servers(database, 2, tokens_per_minute=100) as (a, b):
        assert await a.admitted(1000) is not None
        with pytest.raises(QuotaExceeded) as caught:
            await b.quotas.admit("acme", 10)
        assert caught.value.retry_after_s is not None
        assert caught.value.retry_after_s > 300


async def test_places_are_everybodys_and_come_free_with_the_server_that_held_them(database: Database) -> None:
    async with servers(database, 3, max_concurrent=4) as (a, b, killed):
        leases = [await a.admitted(), await b.admitted(), await killed.admitted(), await killed.admitted()]
        assert None not in leases
        assert [await server.admitted() for server in (a, b, killed)] == [None] * 3
        assert leases[0] is not None
        leases[0].settle(1, 1)

        async def b_answers() -> bool:
            return await b.admitted() is not None

        await until(b_answers)
        await asyncio.sleep(0.2)  # more than what was refused is closed for
        assert await a.admitted() is None

        async def a_answers() -> bool:
            for server in (a, b):
                await asyncio.to_thread(server.replicas.beat, 0)
            return await a.admitted() is not None

        await until(a_answers)  # the third says nothing any more, and is taken to be gone


async def test_a_quota_of_nothing_allows_nothing_and_no_quota_asks_nobody(
    database: Database, cluster: postgres.Cluster
) -> None:
    for name in ("requests_per_minute", "tokens_per_minute", "max_concurrent"):
        async with servers(database, 1, **{name: 0}) as (server,):
            assert await server.admitted() is None
    async with servers(database, 1) as (server,):
        with cluster.paused():
            assert await server.admitted() is not None
            assert server.num_fallbacks == 0


async def test_without_the_database_each_server_lets_its_part_through(
    database: Database, cluster: postgres.Cluster
) -> None:
    async with servers(database, 2, requests_per_minute=40) as (a, b):
        with cluster.paused():
            async with asyncio.timeout(PATIENCE_S):
                done = [await asyncio.gather(*(server.admitted() for _ in range(30))) for server in (a, b)]
            counts = [sum(lease is not None for lease in some) for some in done]
            assert all(20 <= count < 30 for count in counts)  # twenty, and what comes of a few seconds
            assert a.num_fallbacks == b.num_fallbacks == 30

        async def asks_again() -> bool:
            before = a.num_fallbacks
            await a.admitted()
            return a.num_fallbacks == before

        await until(asks_again)


async def test_a_request_that_comes_while_an_idle_share_is_given_back_counts(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with servers(database, 1, max_concurrent=1, tokens_per_minute=600) as (server,):
        first = await server.admitted(600)
        assert first is not None
        is_giving, may_give = threading.Event(), threading.Event()
        give_back = server.buckets.give_back

        def held(tenant: str, units: dict[Kind, tuple[float, int]], seats: int | None) -> None:
            is_giving.set()
            may_give.wait(PATIENCE_S)
            give_back(tenant, units, seats)

        monkeypatch.setattr(server.buckets, "give_back", held)
        server.ahead_s = 3600.0
        first.settle(0, 0)
        await asyncio.to_thread(is_giving.wait, PATIENCE_S)
        coming = asyncio.create_task(server.admitted(600))
        await asyncio.sleep(0)  # it waits for the share
        may_give.set()
        second = await coming
        assert second is not None
        assert await server.admitted(1) is None  # the one place is in use
        second.settle(0, 0)

        async def answers() -> bool:
            return await server.admitted(600) is not None

        await until(answers)  # all that was charged has come back


async def test_a_request_that_needs_less_than_what_was_refused_is_asked_for(database: Database) -> None:
    async with servers(database, 1, tokens_per_minute=1000) as (server,):
        assert await server.admitted(900) is not None
        server.quotas._clock = lambda: 0.0  # what was refused stays fresh
        assert await server.admitted(900) is None
        assert await server.admitted(60) is not None


async def test_places_that_the_database_knows_count_while_it_is_away(
    database: Database, cluster: postgres.Cluster
) -> None:
    async with servers(database, 2, max_concurrent=4) as (a, _):
        held = [await a.admitted(), await a.admitted()]
        assert None not in held
        with cluster.paused():
            assert await a.admitted() is None  # its part are two
            assert held[0] is not None
            held[0].settle(1, 1)
            alone = await a.admitted()
            assert alone is not None
            assert await a.admitted() is None
        held.append(alone)

        async def holds_four() -> bool:
            held.append(await a.admitted())
            return sum(lease is not None for lease in held) == 5

        await until(holds_four)  # of which one has ended
        assert await a.admitted() is None
        for lease in held:
            if lease is not None:
                lease.settle(1, 1)
        a.quotas.check_integrity()
