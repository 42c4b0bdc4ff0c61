"""Requests through an ingress to replicas on one database, without Ray: what it carries, and what losses cost."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from manylora.cluster.exchange import Exchange, Frame, Head, Question
from manylora.cluster.ingress import MAX_UPLOADS, HandedOn, Ingress, key_of
from manylora.cluster.replica import Replica, place_in
from manylora.errors import InvalidSettings, ManyloraError, ReplicaLost
from manylora.lifecycle.weights.served import Inspector
from manylora.serving.parts import Foundation
from manylora.settings import Settings
from manylora.tenants.interface import Role
from manylora.tenants.keys import KeyStore
from tests.catalog import postgres
from tests.catalog.rig import MODULES, CatalogEngine, sound_files

pytestmark = [pytest.mark.anyio, pytest.mark.slow]
MAX_BODY = 2**21
CHUNK = 2**16
PATIENCE_S = 60.0


@dataclass
class Small:
    """Two replicas behind an ingress. `asked` says who got which question; `dying` have that many frames left.

    `key` is a manager's, `user` one of another tenant that may only ask. `before_keys`: how the replicas answered while
    there was none; the first one was told that nobody else reaches it.
    """

    settings: Settings
    replicas: list[Replica]
    engines: list[CatalogEngine]
    client: httpx2.AsyncClient = field(init=False)
    ingress: Ingress = field(init=False)
    asked: list[tuple[int, Question]] = field(default_factory=list)
    dying: list[int] = field(default_factory=list)
    key: str = ""
    user: str = ""
    before_keys: list[int] = field(default_factory=list)

    async def ask(self, question: Question) -> AsyncGenerator[Frame, None]:
        number = len(self.asked) % 2
        self.asked.append((number, question))
        left = self.dying.pop(0) if self.dying else None
        frames = self.replicas[number].answer(question)
        try:
            async for frame in frames:
                if left == 0:
                    raise ReplicaLost("The replica has ended.")
                left = None if left is None else left - 1
                yield frame
        finally:
            await frames.aclose()

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = await self.ingress(Request(scope, receive))
        await answer(scope, receive, send)

    async def post(self, path: str, body: Any, **headers: str) -> httpx2.Response:
        response: httpx2.Response = await self.client.post(
            path, json=body, headers={"authorization": f"Bearer {self.key}", **headers}
        )
        return response


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def started(cluster: postgres.Cluster, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Small]:
    folder = tmp_path_factory.mktemp("cluster")
    settings = Settings(
        data_dir=folder, database_url=cluster.new_database(), max_adapter_size=2**23, max_body=MAX_BODY,
        max_body_memory=2 * MAX_BODY,
    )  # fmt: skip
    engines = [CatalogEngine(), CatalogEngine()]
    replicas = [
        Replica(settings, _at_once, _over(engine, folder), is_private=engine is engines[0]) for engine in engines
    ]
    async with AsyncExitStack() as stack:
        for replica in replicas:
            await replica.start()
            stack.push_async_callback(replica.close)
        small = Small(settings, replicas, engines)
        small.ingress = Ingress(small.ask, settings)
        transport = httpx2.ASGITransport(app=small.app)
        small.client = await stack.enter_async_context(
            httpx2.AsyncClient(transport=transport, base_url="http://localhost")
        )
        small.before_keys = [(await small.client.get("/v1/models")).status_code for _ in replicas]
        keys = KeyStore(replicas[0]._running_parts.catalog.database)
        _, small.key = keys.create("acme", Role.MANAGER)
        _, small.user = keys.create("rival", Role.USER)
        for replica in replicas:
            await replica._running_parts.gate.refresh()
        yield small


@pytest.fixture
def small(started: Small) -> Small:
    started.asked.clear()
    started.dying.clear()
    assert started.ingress._presence.is_empty, "the test before this one left something"
    for engine in started.engines:
        engine.generations.clear()
        engine.step_s = 0.0
    return started


async def _at_once(piece: Any) -> bytes:
    return bytes(piece)


def _over(engine: CatalogEngine, folder: Path) -> Callable[[Settings], Foundation]:
    foundation = Foundation(modules=MODULES, inspect=Inspector(folder, MODULES), build_engine=lambda *_: engine)
    return lambda _: foundation


async def push(small: Small, name: str, seed: float) -> httpx2.Response:
    parts = [("files", (file, data)) for file, data in sound_files(seed).items()]
    response: httpx2.Response = await small.client.post(
        "/v1/adapters", data={"name": name}, files=parts, headers={"authorization": f"Bearer {small.key}"}
    )
    return response


async def push_big(small: Small) -> httpx2.Response:
    """Larger than a piece."""
    response: httpx2.Response = await small.client.post(
        "/v1/adapters",
        data={"name": "big"},
        files=[("files", ("adapter_model.safetensors", bytes(6 * 2**20)))],
        headers={"authorization": f"Bearer {small.key}"},
    )
    return response


COMPLETION = {"model": "base-model", "prompt": "hi", "max_tokens": 5}


async def test_what_one_replica_was_sent_another_answers_with(small: Small) -> None:
    pushed = await push(small, "sound", 2.0)
    assert (pushed.status_code, small.asked[-1][0]) == (201, 0)

    answered = await small.post("/v1/completions", {**COMPLETION, "model": "sound", "max_tokens": 9})

    assert (answered.status_code, small.asked[-1][0]) == (200, 1)
    assert answered.json()["choices"][0]["text"] == "sound@1: "


async def test_routers_hear_which_adapters_a_replica_has(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    await push(small, "known", 3.0)
    for _ in range(2):  # one of the replicas has it by then, the other too
        assert (await small.post("/v1/completions", {**COMPLETION, "model": "known"})).status_code == 200
    key = small.asked[-1][1].key
    seats = small.settings.max_num_seqs

    assert [replica.residency()["seats"] for replica in small.replicas] == [seats, seats]
    assert key.endswith("/known")
    assert key not in small.replicas[0].residency()["tiers"]  # where the engine says that it is on disk

    monkeypatch.setattr(small.engines[0], "tier_of", lambda _ref: "host")
    assert small.replicas[0].residency()["tiers"][key] == "host"


async def test_a_replica_that_ends_before_it_answers_costs_nobody_a_request(small: Small) -> None:
    small.dying[:] = [0, 0]

    answered = await small.post("/v1/completions", COMPLETION)

    assert answered.json()["choices"][0]["text"] == "The q"
    assert [number for number, _ in small.asked] == [0, 1, 0]


@pytest.mark.parametrize(
    ("path", "body", "last"),
    [
        ("/v1/completions", {}, b'data: {"error":{'),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}]}, b'event: error\ndata: {"type":"error"'),
        ("/v1/responses", {"input": "hi"}, b'event: error\ndata: {"type":"error","sequence_number":'),
        ("/api/generate", {}, b'{"error":"'),
    ],
)
async def test_a_stream_whose_replica_ends_says_so_in_its_last_event(
    small: Small, path: str, body: dict[str, Any], last: bytes
) -> None:
    for engine in small.engines:
        engine.step_s = 0.001
    asked = {"model": "base-model", "stream": True, **body}
    if path in ("/v1/completions", "/api/generate"):
        asked["prompt"] = "hi"
    if path == "/v1/messages":
        asked["max_tokens"] = 20
    small.dying[:] = [3]  # the head and two pieces

    answered = await small.post(path, asked)

    assert answered.status_code == 200
    assert len(small.asked) == 1
    end = "\n" if path == "/api/generate" else "\n\n"
    final = answered.content.removesuffix(end.encode()).split(end.encode())[-1]
    assert final.startswith(last)
    assert b"replica" in final
    assert b"[DONE]" not in answered.content


async def test_what_may_have_been_done_is_not_done_twice(small: Small) -> None:
    small.dying[:] = [0]

    answered = await push(small, "twice", 4.0)

    assert (answered.status_code, answered.json()["error"]["code"]) == (503, "replica_lost")
    assert "Look whether it was done" in answered.json()["error"]["message"]
    assert len(small.asked) == 1


async def test_when_no_replica_lives_long_enough_there_is_an_end(small: Small) -> None:
    small.dying[:] = [0] * 20

    answered = await small.post("/v1/completions", COMPLETION)

    assert (answered.status_code, answered.headers["retry-after"]) == (503, "5")
    assert len(small.asked) == 4


async def test_a_client_that_leaves_takes_its_sequence_along(small: Small) -> None:
    for engine in small.engines:
        engine.step_s = 0.05
    left, sent = asyncio.Event(), asyncio.Event()
    body = json.dumps({**COMPLETION, "max_tokens": 100, "stream": True}).encode()
    bodies = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Any:
        if (message := next(bodies, None)) is not None:
            return message
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message.get("body"):
            sent.set()

    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "http_version": "1.1",
        "headers": [(b"authorization", f"Bearer {small.key}".encode()), (b"host", b"localhost"),
                    (b"content-type", b"application/json")],
    }  # fmt: skip
    running = asyncio.ensure_future(small.app(scope, receive, send))
    async with asyncio.timeout(60):
        await sent.wait()
        left.set()
        await running
        while not small.engines[0].generations[0].is_closed:
            await asyncio.sleep(0.01)
    assert small.engines[0].generations[0].num_output_tokens < 40


class Slow:
    """A body whose first bytes come at once, and whose rest, which never ends, when it is let go."""

    def __init__(self, first: int = CHUNK) -> None:
        self.first = first
        self.rest = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield bytes(self.first)
        await self.rest.wait()
        while True:
            await asyncio.sleep(0)
            yield bytes(CHUNK)


def begun(small: Small, path: str, body: Slow, key: str) -> "asyncio.Task[httpx2.Response]":
    headers = {"authorization": f"Bearer {key}"}
    return asyncio.create_task(small.client.post(path, content=body, headers=headers))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture
def kept(small: Small, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """The pieces that were put where replicas fetch them."""
    pieces: list[bytes] = []

    def keep(piece: bytes) -> bytes:
        pieces.append(piece)
        return piece

    monkeypatch.setattr(small.ingress, "_keep", keep)
    yield pieces
    assert small.ingress._presence.is_empty
    assert not small.ingress._uploads


async def test_large_bodies_are_refused_by_their_route_and_strangers_before_they_are_read(small: Small) -> None:
    announced = await small.post("/v1/completions", {**COMPLETION, "prompt": "x" * MAX_BODY})
    endless = Slow()
    endless.rest.set()
    unannounced = await begun(small, "/v1/completions", endless, small.key)
    strangers = [
        await begun(small, path, endless, "ml_nobody") for path in ("/v1/adapters", "/v1/completions", "/v1/messages")
    ]

    assert [answer.status_code for answer in (announced, unannounced, *strangers)] == [413, 413, 401, 401, 401]
    assert [question.path for _, question in small.asked[-3:]] == ["/v1/files", "/v1/stats", "/v1/stats"]
    assert strangers[2].json()["type"] == "error", "in the words of the route"
    assert small.ingress._presence.is_empty


async def test_bodies_of_strangers_take_half_of_the_room_and_those_of_one_key_the_other(small: Small) -> None:
    half = MAX_BODY
    assert small.settings.max_body_memory == 2 * half
    slow = [Slow() for _ in range(half // CHUNK)]
    strangers = [begun(small, "/v1/completions", body, "ml_nobody") for body in slow]
    await until(lambda: small.ingress._presence._num_bytes == half)
    assert not small.asked

    stranger = await begun(small, "/v1/completions", Slow(1), "ml_nobody")
    keyed = await small.post("/v1/completions", COMPLETION)
    filling = begun(small, "/v1/completions", Slow(half), small.key)
    await until(lambda: small.ingress._presence._num_bytes == 2 * half)
    same = await small.client.post(
        "/v1/completions", content=b"{}", headers={"authorization": f"bearer   {small.key} "}
    )

    assert [answer.status_code for answer in (stranger, keyed, same)] == [401, 200, 429]
    for running in (*strangers, filling):
        running.cancel()
    await asyncio.gather(*strangers, filling, return_exceptions=True)
    assert small.ingress._presence.is_empty


async def test_a_body_that_does_not_come_is_waited_for_as_long_as_a_server_does(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert small.ingress._body_timeout_s == small.settings.body_timeout_s
    monkeypatch.setattr(small.ingress, "_body_timeout_s", 0.05)

    answered = await begun(small, "/v1/completions", Slow(10), small.key)

    assert (answered.status_code, answered.json()["error"]["code"]) == (408, "request_timeout")
    assert answered.headers["connection"] == "close"
    assert small.asked == []


async def test_an_upload_comes_in_pieces(small: Small, kept: list[bytes]) -> None:
    answered = await push_big(small)

    assert [len(piece) for piece in kept] == [4 * 2**20]
    assert answered.status_code == 422  # there is no config in it


@pytest.mark.parametrize("path", ["/v1/adapters", "/v1/adapters/", "/v1/files"])
async def test_a_key_that_may_not_upload_is_told_so_before_anything_is_kept(
    small: Small, kept: list[bytes], path: str
) -> None:
    endless = Slow()
    endless.rest.set()

    answered = await begun(small, path, endless, small.user)

    assert (answered.status_code, answered.json()["error"]["code"]) == (403, "insufficient_role")
    assert [question.method for _, question in small.asked] == ["GET"]
    assert kept == []


async def test_a_key_sends_a_few_uploads_at_a_time(small: Small, kept: list[bytes]) -> None:
    slow = [Slow(2 * CHUNK) for _ in range(MAX_UPLOADS)]
    running = [begun(small, "/v1/files", body, small.key) for body in slow]
    await until(lambda: small.ingress._uploads.total() == MAX_UPLOADS)

    refused = await begun(small, "/v1/adapters", Slow(2 * CHUNK), small.key)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limited")
    running.pop().cancel()
    await until(lambda: small.ingress._uploads.total() == MAX_UPLOADS - 1)
    assert (await push_big(small)).status_code == 422

    for each in running:
        each.cancel()
    await asyncio.gather(*running, return_exceptions=True)


async def test_without_keys_a_replica_answers_where_it_was_told_that_nobody_else_comes_in(small: Small) -> None:
    """Whatever its settings call the host: something else listens."""
    assert small.settings.host == "127.0.0.1"
    assert small.before_keys == [200, 401]


def test_what_routers_call_an_adapter() -> None:
    mine, yours = {"authorization": "Bearer a"}, {"x-api-key": "b"}

    assert key_of(b'{"model": "acme/x"}', mine) == "acme/x" == key_of(b'{"model": "acme/x"}', yours)
    assert key_of(b'{"model": "x"}', mine) != key_of(b'{"model": "x"}', yours)
    assert key_of(b'{"model": "base", "adapter_id": "x"}', mine) == key_of(b'{"model": "x"}', mine)
    assert {key_of(body, mine) for body in (b"", b"[1]", b"{", b'{"model": 1}', b'{"model": ""}')} == {""}
    assert key_of(json.dumps({"model": "x" * 1000}).encode(), mine) == ""
    for same in ({"x-api-key": "a"}, {"authorization": "bearer  a "}, {"authorization": "", "x-api-key": " a"}):
        assert key_of(b'{"model": "x"}', same) == key_of(b'{"model": "x"}', mine)


async def test_an_answer_that_nobody_fetches_waits() -> None:
    exchange = Exchange(Question("GET", "/", b"/", b"", ()), _at_once)
    await exchange.send({"type": "http.response.start", "status": 200, "headers": []})
    await exchange.send({"type": "http.response.body", "body": bytes(2**20), "more_body": True})
    waiting: Awaitable[None] = asyncio.ensure_future(
        exchange.send({"type": "http.response.body", "body": b"more", "more_body": False})
    )
    await asyncio.sleep(0.01)
    assert not waiting.done()  # type: ignore[attr-defined]

    frames = [frame async for frame in exchange.frames()]
    await waiting

    assert b"".join(frame for frame in frames if isinstance(frame, bytes)) == bytes(2**20) + b"more"


async def test_half_of_a_file_never_looks_whole() -> None:
    exchange = Exchange(Question("GET", "/", b"/", b"", ()), _at_once)
    await exchange.send({"type": "http.response.start", "status": 200, "headers": []})
    await exchange.send({"type": "http.response.body", "body": b"half", "more_body": True})
    exchange.end()  # as an application that raised
    frames = exchange.frames()
    head = await anext(frames)
    assert isinstance(head, Head)
    sent: list[Message] = []

    async def stays() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    with pytest.raises(ManyloraError, match="in the middle of this answer"):
        await HandedOn(head, frames)({"type": "http", "path": "/"}, stays, send)

    assert [message.get("body") for message in sent] == [None, b"half"]
    assert all(message.get("more_body", True) for message in sent), "the connection breaks off"


def test_replicas_on_one_machine_have_folders_of_their_own_and_share_a_store(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, database_url="postgresql://nowhere/x")
    (first, lock), (second, other) = place_in(settings), place_in(settings)
    lock.release()
    again, third = place_in(settings)
    for each in (other, third):
        each.release()

    assert [each.data_dir.parent.name for each in (first, second, again)] == ["0", "1", "0"]
    assert {each.store_url for each in (first, second, again)} == {f"file://{tmp_path}/store"}
    with pytest.raises(InvalidSettings, match="database_url"):
        place_in(Settings(data_dir=tmp_path))
