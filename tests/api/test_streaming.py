"""Streams: events, usage, the last event, errors after the first byte, clients that leave."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import anyio
import httpx
import openai
import orjson
import pytest
from fastapi import FastAPI
from starlette.types import Message

from manylora.api.sse import EventStream
from manylora.errors import ManyloraError, QueueFull
from manylora.settings import Settings
from manylora_loadtest.results import RequestResult
from manylora_loadtest.stream import StreamReader

from .conftest import Rig
from .test_answers import events

COMMENT = b": keep-alive\n\n"
CHAT: dict[str, Any] = {"model": "base-model", "messages": [{"role": "user", "content": "hi"}]}
BODY: dict[str, Any] = {"model": "base-model", "prompt": "hi", "stream": True}


def test_the_events_joined_are_the_answer(rig: Rig) -> None:
    answer = rig.complete(stream=True, max_tokens=9)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    data = events(answer.text)
    assert "".join(e["choices"][0]["text"] for e in data) == "The quick"
    assert [e["choices"][0]["finish_reason"] for e in data] == [None] * 8 + ["length"]
    assert len({(e["id"], e["created"], e["model"], e["object"]) for e in data}) == 1


def test_a_chat_stream_begins_with_the_role_of_every_choice(rig: Rig) -> None:
    data = events(rig.chat(stream=True, n=2, max_tokens=2).text)
    opening = [(e["choices"][0]["index"], e["choices"][0]["delta"].get("role")) for e in data[:2]]
    assert opening == [(0, "assistant"), (1, "assistant")]
    for index in range(2):
        mine = [e["choices"][0] for e in data if e["choices"][0]["index"] == index]
        assert "".join(c["delta"]["content"] for c in mine) == "Th"
        assert mine[-1]["finish_reason"] == "length"
    assert {e["object"] for e in data} == {"chat.completion.chunk"}


@pytest.mark.parametrize("route", ["complete", "chat"])
def test_usage_comes_in_one_more_event_when_asked_for(rig: Rig, route: str) -> None:
    *others, last = events(getattr(rig, route)(stream=True, max_tokens=3, stream_options={"include_usage": True}).text)
    assert all(e["usage"] is None and e["choices"] for e in others)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    assert last["manylora"]["queue_ms"] == 1.5
    assert not any("manylora" in e for e in others)


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}])
def test_without_usage_the_last_choice_event_has_the_extension(rig: Rig, options: dict[str, Any] | None) -> None:
    *others, last = events(rig.complete(stream=True, n=2, max_tokens=3, stream_options=options).text)
    assert all("usage" not in e for e in (*others, last))
    assert last["choices"][0]["finish_reason"] == "length"
    assert last["manylora"]["adapter"] is None
    assert not any("manylora" in e for e in others)


def test_half_a_character_is_no_event(rig: Rig) -> None:
    rig.engine.ids = (97, 900, 901, 902, 98)
    data = events(rig.complete(stream=True).text)
    assert [e["choices"][0]["text"] for e in data] == ["a", "你", "b"]


def test_logprobs_are_streamed_with_offsets_that_go_on(rig: Rig) -> None:
    data = events(rig.complete(stream=True, max_tokens=3, logprobs=1).text)
    assert [e["choices"][0]["logprobs"]["text_offset"] for e in data] == [[0], [1], [2]]
    chat = events(rig.chat(stream=True, max_tokens=2, logprobs=True).text)
    assert [c["token"] for e in chat[1:] for c in e["choices"][0]["logprobs"]["content"]] == ["T", "h"]


def test_several_prompts_stream_side_by_side(rig: Rig) -> None:
    data = events(rig.complete(stream=True, prompt=["a", "b"], n=2, max_tokens=2).text)
    texts = {i: "".join(e["choices"][0]["text"] for e in data if e["choices"][0]["index"] == i) for i in range(4)}
    assert texts == dict.fromkeys(range(4), "Th")
    assert "manylora" in data[-1]


@pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
def test_an_error_after_the_first_byte_is_one_event_and_the_end(rig: Rig, prompt: Any) -> None:
    rig.engine.error_at, rig.engine.error = 2, ManyloraError("the engine tripped")
    answer = rig.complete(stream=True, prompt=prompt)
    assert answer.status_code == 200
    *data, last, rest = answer.text.split("\n\n")
    assert rest == ""
    assert len(data) >= 2
    assert orjson.loads(last.removeprefix("data: "))["error"]["message"] == "the engine tripped"
    assert not rig.engine.open
    assert rig.finished[-1].outcome == "error"


def test_an_unforeseen_error_in_a_stream_tells_nothing_of_its_inside(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []

    async def stumble() -> None:
        steps.append(1)
        if len(steps) == 3:
            raise RuntimeError("secret of the inside")

    monkeypatch.setattr(rig.engine, "pace", stumble)
    answer = rig.complete(stream=True)
    assert answer.text.count("data: ") == 3
    assert '"error"' in answer.text
    assert "secret" not in answer.text


class Connection:
    """One ASGI call by hand: what the client sends, what it has received, and when it leaves."""

    def __init__(self, app: FastAPI, body: dict[str, Any], *, path: str = "/v1/completions") -> None:
        self.app = app
        self.sent: list[Message] = []
        self._body = orjson.dumps(body)
        self._left = anyio.Event()
        self._is_read = False
        self.fails_on_send = False
        self.scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "http_version": "1.1",
            "scheme": "http",
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
            "asgi": {"version": "3.0", "spec_version": "2.4"},
        }

    def leave(self) -> None:
        self._left.set()

    @property
    def num_events(self) -> int:
        return sum(bool(m.get("body")) for m in self.sent)

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.sent)

    async def receive(self) -> Message:
        if not self._is_read:
            self._is_read = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self.fails_on_send and self.num_events >= 2:
            raise OSError("the peer has gone")
        self.sent.append(message)

    async def run(self) -> None:
        await self.app(self.scope, self.receive, self.send)


@pytest.mark.anyio
async def test_events_are_sent_as_they_come(rig: Rig) -> None:
    rig.engine.step_s = 0.01
    connection = Connection(rig.app, BODY)
    async with anyio.create_task_group() as group:
        group.start_soon(connection.run)
        while connection.num_events < 3:
            await anyio.sleep(0.001)
        assert rig.engine.open, "the answer is not finished and three events are out"
    assert not rig.engine.open


@pytest.mark.anyio
@pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
async def test_a_client_that_leaves_a_stream_aborts_its_request(rig: Rig, prompt: Any) -> None:
    rig.engine.step_s = 0.01
    connection = Connection(rig.app, {**BODY, "prompt": prompt})
    async with anyio.create_task_group() as group:
        group.start_soon(connection.run)
        while connection.num_events < 3:
            await anyio.sleep(0.001)
        connection.leave()
    assert not rig.engine.open
    assert rig.finished[-1].outcome == "cancelled"
    assert rig.gate.leases[0].settled == (rig.finished[-1].prompt_tokens, rig.finished[-1].completion_tokens)
    assert 0 < rig.finished[-1].completion_tokens < 32


@pytest.mark.anyio
async def test_a_client_that_shows_its_absence_only_in_send_aborts_its_request(rig: Rig) -> None:
    rig.engine.step_s = 0.001
    connection = Connection(rig.app, BODY)
    connection.fails_on_send = True
    await connection.run()
    assert not rig.engine.open
    assert rig.finished[-1].outcome == "cancelled"


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_before_the_first_token_aborts_its_request(rig: Rig, stream: bool) -> None:
    rig.engine.step_s = 60
    connection = Connection(rig.app, {**BODY, "stream": stream})
    async with anyio.create_task_group() as group:
        group.start_soon(connection.run)
        while not rig.engine.generations:
            await anyio.sleep(0.001)
        connection.leave()
    assert not rig.engine.open
    assert connection.sent == []
    assert rig.finished[-1].outcome == "cancelled"
    assert rig.gate.leases[0].settled == (0, 0)


@pytest.mark.anyio
async def test_a_cancelled_call_cleans_up_too(rig: Rig) -> None:
    rig.engine.step_s = 0.01
    connection = Connection(rig.app, BODY)
    call = asyncio.ensure_future(connection.run())
    while connection.num_events < 2:
        await anyio.sleep(0.001)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert not rig.engine.open
    assert rig.finished[-1].outcome == "cancelled"


def test_a_real_server_notices_that_a_streaming_client_left(rig: Rig, serve: Callable[[FastAPI], Any]) -> None:
    rig.engine.step_s = 0.02
    rig.engine.text = "endless " * 25
    with serve(rig.app) as url:
        with httpx.stream("POST", f"{url}/v1/completions", json={**BODY, "max_tokens": 200}) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            assert rig.engine.open
        while rig.engine.open:
            httpx.get(f"{url}/health")
    assert rig.finished[-1].outcome == "cancelled"
    assert rig.finished[-1].completion_tokens < 200


@pytest.mark.parametrize("route", ["complete", "chat"])
@pytest.mark.parametrize("last", [True, False])
def test_running_usage_is_in_every_event(rig: Rig, route: str, last: bool) -> None:
    options = {"include_usage": last, "continuous_usage_stats": True}
    answer = getattr(rig, route)(stream=True, max_tokens=5, n=2, stream_options=options)
    data = events(answer.text)
    usages = [event["usage"] for event in data if event is not None]
    assert all(usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] for usage in usages)
    counts = [usage["completion_tokens"] for usage in usages]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] == 10
    assert ([] in [event["choices"] for event in data if event is not None]) == last


@pytest.fixture
def silent(tmp_path: Path) -> Rig:
    """Each token takes longer than a stream may be silent."""
    rig = Rig(Settings(data_dir=tmp_path, stream_keep_alive_s=0.02))
    rig.engine.step_s = 0.2
    return rig


def slow_connection(rig: Rig, **body: Any) -> Connection:
    """Each token comes once a comment was sent since the one before."""
    connection = Connection(rig.app, {**BODY, **body})
    connection.scope["headers"].append((b"host", b"127.0.0.1"))
    num_seen = 0

    async def after_a_comment() -> None:
        nonlocal num_seen
        while connection.body.count(COMMENT) <= num_seen:
            await asyncio.sleep(0.001)
        num_seen = connection.body.count(COMMENT)
        if rig.engine.error_at == 1:
            raise rig.engine.error

    rig.engine.pace = after_a_comment  # type: ignore[method-assign]
    return connection


@pytest.mark.anyio
async def test_a_silent_stream_shows_that_it_lives(silent: Rig) -> None:
    connection = slow_connection(silent, max_tokens=3)
    await connection.run()
    text = connection.body.decode()
    blocks = text.split("\n\n")
    assert blocks[0] == ": keep-alive", "before the first token"
    places = [number for number, block in enumerate(blocks) if block.startswith("data:")]
    assert all(blocks[number - 1] == ": keep-alive" for number in places[:3]), "and between two"
    assert {block for block in blocks if not block.startswith("data:")} == {": keep-alive", ""}
    assert "".join(e["choices"][0]["text"] for e in events(text.replace(": keep-alive\n\n", ""))) == "The"


def test_a_stream_that_says_something_in_time_has_no_comment(rig: Rig) -> None:
    assert ": keep-alive" not in rig.complete(stream=True).text


def test_an_error_before_the_first_comment_has_its_own_status(silent: Rig) -> None:
    silent.engine.error_at = 0
    assert silent.complete(stream=True).status_code == 500
    silent.engine.error_at, silent.engine.refuse = None, QueueFull("full")
    assert silent.complete(stream=True).status_code == 429


@pytest.mark.anyio
async def test_an_error_after_it_is_the_last_event(silent: Rig) -> None:
    silent.engine.error_at = 1
    connection = slow_connection(silent)
    await connection.run()
    assert connection.sent[0]["status"] == 200
    *comments, last, rest = connection.body.decode().split("\n\n")
    assert set(comments) == {": keep-alive"}
    assert orjson.loads(last.removeprefix("data: "))["error"]["message"] == "the engine tripped"
    assert rest == ""


@pytest.mark.anyio
async def test_no_comment_comes_after_an_error_whenever_that_is() -> None:
    async def events_after(num_turns: int) -> AsyncGenerator[list[bytes], None]:
        for _ in range(num_turns):
            await asyncio.sleep(0)
        yield [b"first"]
        raise ManyloraError("the engine tripped")

    async def stay() -> Message:
        await asyncio.sleep(3600)
        return {"type": "http.disconnect"}

    num_comments = 0
    for num_turns in range(12):
        sent: list[bytes] = []

        async def keep(message: Message, sent: list[bytes] = sent) -> None:
            await asyncio.sleep(0)  # a comment that is due meanwhile begins to be sent
            sent.append(message.get("body", b""))

        await EventStream(events_after(num_turns), headers={}, keep_alive_s=0)({}, stay, keep)
        num_comments += sent.count(COMMENT)
        assert sent[-1] == b""
        assert sent[-2].startswith(b'data: {"error"'), num_turns
    assert num_comments


@pytest.mark.anyio
async def test_a_client_that_leaves_in_the_silence_aborts_its_request(silent: Rig) -> None:
    silent.engine.step_s = 60
    connection = Connection(silent.app, BODY)
    connection.scope["headers"].append((b"host", b"127.0.0.1"))
    async with anyio.create_task_group() as group:
        group.start_soon(connection.run)
        while connection.num_events < 2:
            await anyio.sleep(0.001)
        connection.leave()
    assert not silent.engine.open
    assert silent.finished[-1].outcome == "cancelled"


def test_clients_skip_the_comments(silent: Rig, serve: Callable[[FastAPI], Any]) -> None:
    """OpenAI's own, and our load test's reader."""
    with serve(silent.app) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
        for chunks in (
            [c.choices[0].text for c in client.completions.create(**{**BODY, "max_tokens": 3})],
            [
                c.choices[0].delta.content or ""
                for c in client.chat.completions.create(**CHAT, max_tokens=3, stream=True)
            ],
        ):
            assert "".join(chunks) == "The"
    answer = silent.complete(stream=True, max_tokens=3)
    content = answer.content.replace(b"data: ", COMMENT + b"data: ")  # however many it had
    result = RequestResult(0, 0, "public", None, False, 1, 3, 0.0)
    reader = StreamReader(result)
    for byte in content:
        reader.feed(bytes([byte]), 1.0)
    reader.end()
    assert (result.outcome, result.num_events) == ("ok", 3)
