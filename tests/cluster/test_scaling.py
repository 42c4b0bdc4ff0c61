"""A cluster that scales: one replica more while there is more to do than one should have, and one again behind it."""

import asyncio
from pathlib import Path

import httpx
import pytest

from tests.catalog import postgres

from .started import PATIENCE_S, Running, complete

pytestmark = [pytest.mark.ray, pytest.mark.anyio]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def until_there_are(running: Running, count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while len(running.replicas()) != count:
            await asyncio.sleep(0.5)


async def test_load_brings_a_replica_and_its_end_takes_it_away_and_nobody_fails(
    cluster: postgres.Cluster, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    settings = {
        "served-name": "tiny", "port": 0, "dtype": "float32", "num-threads": 1, "kv-cache-memory": "16MiB",
        "adapter-memory": "16MiB", "host-tier-memory": "16MiB", "max-num-seqs": 8, "data-dir": tmp_path / "data",
        "database-url": cluster.new_database(), "store-url": f"file://{tmp_path}/store",
        "replicas": 1, "max-replicas": 2, "target-requests": 2, "up-after-s": 1, "down-after-s": 2,
    }  # fmt: skip
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    running = await asyncio.to_thread(Running, [str(tiny_llama_dir), *flags], tmp_path / "log")
    statuses: list[int] = []
    replicas: set[str] = set()
    at_a_time = [6]  # askers that go on

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        while number < at_a_time[0]:
            answer = await complete(client, "tiny", 60)
            statuses.append(answer.status_code)
            replicas.add(answer.headers["x-manylora-replica"])

    try:
        async with httpx.AsyncClient(base_url=running.url, timeout=PATIENCE_S) as client:
            assert len(running.replicas()) == 1
            asking = [asyncio.ensure_future(ask(client, number)) for number in range(at_a_time[0])]
            try:
                await until_there_are(running, 2)
                async with asyncio.timeout(PATIENCE_S):
                    while len(replicas) < 2:  # it answers, too
                        await asyncio.sleep(0.1)
                at_a_time[0] = 1
                await until_there_are(running, 1)
            finally:
                at_a_time[0] = 0
                await asyncio.gather(*asking)
            assert (await complete(client, "tiny")).status_code == 200
    finally:
        await asyncio.to_thread(running.end)
    assert set(statuses) == {200}
