"""Sockets taken early, and a server that drains on the first signal and ends on the second."""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from manylora.errors import StartupError
from manylora.metrics import Metrics
from manylora.serving.app import create_app
from manylora.serving.http_server import DrainingServer, bind, is_loopback, make_config
from manylora.settings import Settings

from .api.fakes import FakeDirectory, FakeEngine, FakeGate

BODY = {"model": "base-model", "prompt": "hi", "max_tokens": 40, "stream": True}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_addresses_are_known(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_any_other_address_may_be_reached_from_elsewhere(host: str) -> None:
    assert not is_loopback(host)


def test_a_port_in_use_is_a_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=rf"Port {port} on 127\.0\.0\.1.*--port"):
            bind("127.0.0.1", port)


def test_a_host_that_is_not_this_machines_is_a_clear_error() -> None:
    with pytest.raises(StartupError, match=r"192\.0\.2\.1"):
        bind("192.0.2.1", 0)
    with pytest.raises(StartupError, match="--host"):
        bind("no such host", 0)


def test_nobody_can_connect_before_the_server_listens() -> None:
    with bind("127.0.0.1", 0) as sock, socket.socket() as client:
        assert client.connect_ex(sock.getsockname()) != 0


@asynccontextmanager
async def running(
    engine: FakeEngine, tmp_path: Path, *, drain_s: float
) -> AsyncIterator[tuple[str, asyncio.Task[None]]]:
    """A server in this process, whose signals are this process's."""
    settings = Settings(data_dir=tmp_path)
    app = create_app(settings, engine, FakeDirectory(), FakeGate(), Metrics())
    started = asyncio.Event()
    server = DrainingServer(make_config(app), drain=lambda: engine.drain(drain_s), on_started=started.set)
    sock = bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    task = asyncio.create_task(server.serve(sockets=[sock]))
    await started.wait()
    yield f"http://127.0.0.1:{port}", task
    await task


@pytest.mark.anyio
async def test_the_first_signal_lets_running_streams_finish_and_refuses_new_requests(tmp_path: Path) -> None:
    engine = FakeEngine(step_s=0.02)
    async with running(engine, tmp_path, drain_s=30) as (url, task), httpx.AsyncClient() as client:
        async with client.stream("POST", f"{url}/v1/completions", json=BODY) as answer:
            lines = answer.aiter_lines()
            assert (await anext(lines)).startswith("data: ")
            signal.raise_signal(signal.SIGTERM)
            while not engine.is_draining:
                await asyncio.sleep(0)
            refused = await client.post(f"{url}/v1/completions", json={**BODY, "stream": False})
            ready = await client.get(f"{url}/ready")
            rest = [line async for line in lines]
        assert refused.status_code == ready.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert rest[-2] == "data: [DONE]" or rest[-1] == "data: [DONE]"
        await task
    assert not engine.open


@pytest.mark.anyio
async def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    engine = FakeEngine(step_s=0.01, text="endless " * 25)
    async with running(engine, tmp_path, drain_s=3600) as (url, task), httpx.AsyncClient() as client:
        answer = await client.send(
            client.build_request("POST", f"{url}/v1/completions", json={**BODY, "max_tokens": 200}), stream=True
        )
        assert (await anext(answer.aiter_lines())).startswith("data: ")
        engine.step_s = 3600
        signal.raise_signal(signal.SIGTERM)
        while not engine.is_draining:
            await asyncio.sleep(0)
        signal.raise_signal(signal.SIGINT)
        await task
        assert not engine.open, "what ran was aborted, since nobody waits for it any more"
        await answer.aclose()


@pytest.mark.anyio
async def test_an_idle_server_ends_with_the_first_signal(tmp_path: Path) -> None:
    async with running(FakeEngine(), tmp_path, drain_s=3600) as (_, task):
        signal.raise_signal(signal.SIGINT)
        await task


@pytest.mark.anyio
async def test_half_sent_requests_do_not_hold_up_the_end_and_are_no_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("manylora.serving.http_server._LAST_WRITES_S", 0.2)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    parts = [
        b"POST /v1",
        head,
        head + b'content-length: 100\r\n\r\n{"model"',
        head + b"transfer-encoding: chunked\r\n\r\n",
    ]
    async with running(FakeEngine(), tmp_path, drain_s=3600) as (url, task), httpx.AsyncClient() as client:
        writers = []
        for part in parts * 5:
            _, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
            writer.write(part)
            writers.append(writer)
        await client.get(f"{url}/health")
        signal.raise_signal(signal.SIGTERM)
        await task
    for writer in writers:
        writer.close()
    assert [record for record in caplog.records if record.exc_info or record.levelname in ("ERROR", "WARNING")] == []


@pytest.mark.anyio
async def test_a_request_that_does_not_end_in_time_is_ended_without_an_error_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("manylora.serving.http_server._LAST_WRITES_S", 0.2)
    engine = FakeEngine(step_s=3600)
    async with running(engine, tmp_path, drain_s=0) as (url, task), httpx.AsyncClient() as client:
        asked = asyncio.create_task(client.post(f"{url}/v1/completions", json={**BODY, "stream": False}, timeout=60))
        while not engine.open:
            await asyncio.sleep(0.01)
        signal.raise_signal(signal.SIGTERM)
        await task
        with pytest.raises(httpx.HTTPError):
            await asked
    assert not engine.open
    assert [record for record in caplog.records if record.exc_info] == []
