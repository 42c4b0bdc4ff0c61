"""Two servers on one database behind nginx, as docs/cluster.md has it, are replaced in turn, and nobody notices."""

import asyncio
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.browser.nginx import documented, free_port, program, running_nginx, with_addresses
from tests.catalog import postgres
from tests.catalog.conftest import cluster

from .conftest import ROOT, Server, running

__all__ = ["cluster"]
pytestmark = [pytest.mark.anyio, pytest.mark.slow]
PATIENCE_S = 120.0
BODY = {"model": "tiny", "prompt": "one two", "ignore_eos": True}


class Clients:
    """Ask through nginx until they are told to stop, whole answers and streams; `ends` is how each request ended."""

    def __init__(self, url: str) -> None:
        self._client = httpx.AsyncClient(base_url=url, timeout=PATIENCE_S)
        self._is_over = False
        self.ends: list[Any] = []

    async def whole(self) -> None:
        while not self._is_over:
            answer = await self._client.post("/v1/completions", json={**BODY, "max_tokens": 3})
            self.ends.append(answer.status_code)

    async def streams(self) -> None:
        while not self._is_over:
            self.ends.append(await self._stream())

    async def _stream(self) -> Any:
        asked = {**BODY, "max_tokens": 200, "stream": True}
        async with self._client.stream("POST", "/v1/completions", json=asked) as answer:
            if answer.status_code != 200:
                return answer.status_code
            lines = [line async for line in answer.aiter_lines() if line]
        return 200 if lines[-1] == "data: [DONE]" and '"finish_reason":"length"' in lines[-2] else lines[-2:]

    async def stop(self, asking: list[asyncio.Task[None]]) -> None:
        self._is_over = True
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*asking)
        await self._client.aclose()


async def stopped(server: Server) -> None:
    """It is told to stop while it runs streams, is not ready from then on, and ends well."""
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client, asyncio.timeout(PATIENCE_S):
        while (await client.get("/v1/stats")).json()["running"] < 2:
            await asyncio.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        while (await client.get("/ready")).status_code != 503:
            await asyncio.sleep(0.01)
    assert await asyncio.to_thread(server.process.wait, PATIENCE_S) == 0


async def test_servers_are_replaced_one_after_the_other_and_no_request_fails(
    settings: dict[str, Any], cluster: postgres.Cluster, tmp_path: Path
) -> None:
    program()
    shared = {
        "database_url": cluster.new_database(), "store_url": f"file://{tmp_path}/store", "adapters": None,
        "drain_delay_s": 0.5,
    }  # fmt: skip
    ports = [free_port(), free_port()]
    addresses = {f"10.0.0.{place}:8000": f"127.0.0.1:{port}" for place, port in enumerate(ports, 1)}
    port = free_port()
    text = with_addresses(documented(ROOT / "docs" / "cluster.md"), addresses | {"listen 80;": f"listen {port};"})
    with ExitStack() as stack:

        def start(place: int) -> Server:
            own = {"port": ports[place], "data_dir": str(tmp_path / f"data-{place}")}
            return stack.enter_context(running(settings | shared | own, tmp_path / f"log-{place}"))

        servers = [start(0), start(1)]
        url = stack.enter_context(running_nginx(text, tmp_path / "nginx", f"http://127.0.0.1:{port}"))
        clients = Clients(url)
        ways = [clients.whole, *[clients.streams] * 4]
        asking = [asyncio.create_task(way()) for way in ways]
        await stopped(servers[0])
        await asyncio.to_thread(start, 0)
        await stopped(servers[1])  # its own successor would change nothing: the first one's has to serve alone
        await clients.stop(asking)
        assert set(map(str, clients.ends)) == {"200"}
        assert len(clients.ends) > 20
