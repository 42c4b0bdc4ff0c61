"""The application over fakes, in process and as a real server on a free port."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient

from manylora.api.record import RequestRecord
from manylora.engine.interface import SamplingParams
from manylora.metrics import Metrics
from manylora.serving.app import create_app
from manylora.serving.http_server import bind, make_config
from manylora.settings import Settings

from .fakes import FakeDirectory, FakeEngine, FakeGate


def typed_events(text: str) -> list[dict[str, Any]]:
    """A stream's events, whose names are their types."""
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


@dataclass
class Rig:
    """An application and the fakes under it."""

    settings: Settings
    engine: FakeEngine = field(default_factory=FakeEngine)
    directory: FakeDirectory = field(default_factory=FakeDirectory)
    gate: FakeGate = field(default_factory=FakeGate)
    metrics: Metrics = field(default_factory=Metrics)
    finished: list[RequestRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.app: FastAPI = create_app(
            self.settings,
            self.engine,
            self.directory,
            self.gate,
            self.metrics,
            recorders=(self.finished.append,),
        )
        self.client = TestClient(self.app, base_url="http://127.0.0.1", raise_server_exceptions=False)

    @property
    def last_params(self) -> SamplingParams:
        """What the engine was asked with last."""
        return self.engine.generations[-1].params

    @property
    def last_messages(self) -> list[dict[str, Any]]:
        """The messages that were rendered last."""
        return self.engine.codec.rendered[-1][0]

    def complete(self, **body: Any) -> httpx2.Response:
        response: httpx2.Response = self.client.post(
            "/v1/completions", json={"model": "base-model", "prompt": "hi", **body}
        )
        return response

    def chat(self, **body: Any) -> httpx2.Response:
        messages = [{"role": "user", "content": "hi"}]
        response: httpx2.Response = self.client.post(
            "/v1/chat/completions", json={"model": "base-model", "messages": messages, **body}
        )
        return response


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", max_body=64 * 1024)


@pytest.fixture
def rig(settings: Settings) -> Rig:
    return Rig(settings)


@pytest.fixture(scope="module")
def shared_rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """One application, with one event loop, for many cases: it takes longer to make than a request."""
    rig = Rig(Settings(data_dir=tmp_path_factory.mktemp("shared"), max_body=64 * 1024))
    with rig.client:
        yield rig


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The application behind a real uvicorn on a free port; gives its address."""
    sock: socket.socket = bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    server = uvicorn.Server(make_config(app))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def serve() -> Callable[[FastAPI], Any]:
    return served


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
