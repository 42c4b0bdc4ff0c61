"""What one connection may cost: long, slow, half-sent and unread ones end, and everybody else goes on being served."""

import asyncio
import contextlib
import resource
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from manylora.api.sse import EventStream
from manylora.serving import connections
from manylora.serving.connections import (
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    MAX_REQUESTS_AHEAD,
    Connections,
    GuardedProtocol,
    Limits,
)
from manylora.serving.http_server import bind, make_config

SHORT_S = 0.5
MIDDLE_S = 3.0  # longer than a busy machine forgets a thread
LONG_S = 3600.0
PATIENCE_S = 60.0
SLOW_HEADER = Limits(header_timeout_s=SHORT_S)
PATIENT = Limits(header_timeout_s=LONG_S, body_timeout_s=LONG_S, idle_timeout_s=LONG_S, write_timeout_s=LONG_S)


@dataclass
class Peer:
    """A client that speaks bytes."""

    address: tuple[str, int]
    sock: socket.socket = field(init=False)

    def __post_init__(self) -> None:
        self.sock = socket.create_connection(self.address, timeout=PATIENCE_S)

    def send(self, data: bytes) -> bool:
        """Whether the server took all of it."""
        try:
            self.sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def rest(self) -> bytes:
        """All that comes until the server closes; fails where it never does."""
        received = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while data := self.sock.recv(2**16):
                received += data
        return bytes(received)

    def until(self, marker: bytes) -> bytes:
        received = bytearray()
        while marker not in received:
            data = self.sock.recv(2**16)
            assert data, f"closed after {bytes(received)!r}"
            received += data
        return bytes(received)

    def close(self) -> None:
        self.sock.close()


@dataclass
class Served:
    """A server in a thread, its connections, and why it ended some."""

    address: tuple[str, int]
    connections: Connections
    ended: list[str]
    peers: list[Peer] = field(default_factory=list)

    def peer(self) -> Peer:
        self.peers.append(Peer(self.address))
        return self.peers[-1]

    def get(self, path: str = "/") -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.address[1]}{path}", timeout=PATIENCE_S)

    def wait(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not is_so():
            if time.monotonic() > deadline:
                pytest.fail("it never came to that")
            time.sleep(0.01)


@contextlib.contextmanager
def serving(app: ASGIApp, limits: Limits) -> Iterator[Served]:
    ended: list[str] = []
    all_connections = Connections(limits, ended.append)
    sock = bind("127.0.0.1", 0)
    server = uvicorn.Server(make_config(app, all_connections))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])), daemon=True)
    served = Served(sock.getsockname(), all_connections, ended)
    thread.start()
    try:
        served.wait(lambda: server.started)
        yield served
    finally:
        for peer in served.peers:
            peer.close()
        server.should_exit = True
        thread.join()


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the body and says how long it was."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message["body"]), message["more_body"]
    body = f"{scope['method']} {size}".encode()
    await answer(send, body)


async def answer(send: Send, body: bytes) -> None:
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


START = b"GET / HTTP/1.1\r\nhost: x\r\n"
ENDLESS = {
    "path": (b"GET /", b"a"),
    "name": (START, b"a"),
    "value": (START + b"a: ", b"a"),
    "lines": (START, b"a: b\r\n"),
    "trailer": (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nb: ", b"a"),
    "trailers": (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n", b"a: b\r\n"),
    "extension": (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1;", b"a"),
    "second": (b"GET / HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\na: ", b"a"),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_eighty_megabytes_without_end_are_refused_after_a_bounded_part(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, unit = ENDLESS[kind]
    parsed: list[int] = []
    feed = GuardedProtocol._feed

    def counted(protocol: GuardedProtocol, data: bytes) -> None:
        parsed.append(len(data))
        feed(protocol, data)

    monkeypatch.setattr(GuardedProtocol, "_feed", counted)
    with serving(hello, PATIENT) as served:
        peer = served.peer()
        sender = threading.Thread(target=peer.send, args=(start + unit * (80 * 2**20 // len(unit)),))
        sender.start()
        received = peer.rest()
        sender.join()
        # A request that came before is answered, and that is then the end of the connection.
        assert received.startswith(b"HTTP/1.1 200 " if kind == "second" else b"HTTP/1.1 431 ")
        assert sum(parsed) < len(start) + 8 * MAX_HEADER_BYTES
        assert served.get().status_code == 200
    assert served.ended == ["long_header"]


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ({"a": "x" * (MAX_HEADER_BYTES - 1000)}, 200),
        ({"a": "x" * MAX_HEADER_BYTES}, 431),
        ({f"a{n}": "x" for n in range(MAX_HEADERS - 10)}, 200),
        ({f"a{n}": "x" for n in range(MAX_HEADERS + 1)}, 431),
    ],
)
def test_a_whole_header_is_taken_up_to_its_bounds(header: dict[str, str], status: int) -> None:
    with serving(hello, PATIENT) as served:
        answered = httpx.get(f"http://127.0.0.1:{served.address[1]}/", headers=header)
    assert answered.status_code == status
    if status == 431:
        assert answered.json()["error"]["code"] == "header_too_large"


@pytest.mark.parametrize("data", [b"G", START, START + b"a: b"])
def test_a_header_that_stops_is_answered_with_408(data: bytes) -> None:
    with serving(hello, SLOW_HEADER) as served:
        peer = served.peer()
        peer.send(data)
        received = peer.rest()
    assert received.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in received
    assert served.ended == ["slow_header"]


def test_a_header_that_goes_on_for_ever_is_dropped_at_its_time() -> None:
    with serving(hello, SLOW_HEADER) as served:
        peer = served.peer()
        while peer.send(b"G" if not served.ended else b"a") and not served.ended:
            time.sleep(0.05)
        assert b" 4" in peer.rest()[:20]


def test_three_thousand_half_sent_requests_are_dropped() -> None:
    with serving(hello, Limits(header_timeout_s=1.0, body_timeout_s=1.0)) as served:
        parts = (b"GET / HTT", START, b"POST / HTTP/1.1\r\ncontent-length: 100\r\n\r\nabc")
        for number in range(3000):
            served.peer().send(parts[number % 3])
        served.wait(lambda: len(served.connections) == 0)
        assert served.get().status_code == 200
        assert sorted(set(served.ended)) == ["slow_body", "slow_header"]
        assert len(served.ended) == 3000


@pytest.mark.parametrize("data", [b"", b"\r\n", b"GET / HTTP/1.1\r\n\r\n"])
def test_a_connection_between_requests_is_closed_after_its_time(data: bytes) -> None:
    with serving(hello, Limits(idle_timeout_s=SHORT_S)) as served:
        peer = served.peer()
        peer.send(data)
        received = peer.rest()
    assert received == b"" or received.endswith(b"GET 0")


@pytest.mark.parametrize("framing", [b"content-length: 100000", b"transfer-encoding: chunked"])
def test_a_body_that_stops_is_answered_with_408(framing: bytes) -> None:
    with serving(hello, Limits(body_timeout_s=SHORT_S)) as served:
        peer = served.peer()
        peer.send(b"POST / HTTP/1.1\r\n" + framing + b"\r\n\r\n1")
        assert peer.rest().startswith(b"HTTP/1.1 408 ")
    assert served.ended == ["slow_body"]


def test_a_body_may_take_as_long_as_it_moves() -> None:
    with serving(hello, Limits(body_timeout_s=MIDDLE_S)) as served:
        peer = served.peer()
        peer.send(b"POST / HTTP/1.1\r\ncontent-length: 40000\r\nconnection: close\r\n\r\n")
        for _ in range(20):
            peer.send(b"x" * 2000)
            time.sleep(MIDDLE_S / 10)
        assert peer.rest().endswith(b"POST 40000")


async def early(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers before the body has come."""
    await answer(send, b"no")


def test_a_body_that_nobody_wants_does_not_keep_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_DROP_S", SHORT_S)
    with serving(early, PATIENT) as served:
        peer = served.peer()
        peer.send(b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n")
        assert peer.until(b"no")
        while peer.send(b"4\r\nabcd\r\n"):
            time.sleep(0.01)


@pytest.mark.parametrize("closing", [b"", b"connection: close\r\n"])
def test_answers_that_nobody_reads_are_thrown_away(closing: bytes) -> None:
    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, b"x" * 7_500_000)

    with serving(large, Limits(write_timeout_s=SHORT_S)) as served:
        for _ in range(30):
            served.peer().send(b"GET / HTTP/1.1\r\n" + closing + b"\r\n")
        served.wait(lambda: len(served.ended) == 30)
        served.wait(lambda: len(served.connections) == 0)
    assert set(served.ended) == {"unread_answer"}


def test_a_stream_that_nobody_reads_ends_its_work() -> None:
    ended = threading.Event()

    async def events() -> AsyncGenerator[list[bytes], None]:
        try:
            while True:
                yield [b"x" * 2**14]
                await asyncio.sleep(0)
        finally:
            ended.set()

    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        with contextlib.suppress(Exception):
            await EventStream(events(), headers={})(scope, receive, send)

    with serving(stream, Limits(write_timeout_s=SHORT_S)) as served:
        served.peer().send(b"GET / HTTP/1.1\r\n\r\n")
        assert ended.wait(PATIENCE_S)
    assert served.ended == ["unread_answer"]


def test_who_reads_slowly_but_steadily_gets_all() -> None:
    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, b"x" * 3_000_000)

    with serving(large, Limits(write_timeout_s=MIDDLE_S)) as served:
        peer = served.peer()
        peer.send(b"GET / HTTP/1.1\r\n\r\n")
        received = 0
        while received < 3_000_000:
            data = peer.sock.recv(2**16)
            assert data
            received += len(data)
            time.sleep(MIDDLE_S / 30)


def test_one_connection_too_many_closes_the_one_that_waited_longest() -> None:
    with serving(hello, Limits(max_connections=4)) as served:
        first, *others = [served.peer() for _ in range(4)]
        first.send(START)
        for peer in others:
            peer.send(b"GET / HTTP/1.1\r\n\r\n")
            peer.until(b"GET 0")
        assert served.get().status_code == 200
        assert first.rest() == b""
        for peer in others:
            peer.send(b"GET / HTTP/1.1\r\n\r\n")
            peer.until(b"GET 0")


def test_where_all_connections_work_one_more_is_told_to_come_back() -> None:
    go = threading.Event()
    begun: list[int] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        begun.append(1)
        while not go.is_set():
            await asyncio.sleep(0.01)
        await answer(send, b"done")

    with serving(work, Limits(max_connections=3)) as served:
        peers = [served.peer() for _ in range(3)]
        for peer in peers:
            peer.send(b"GET / HTTP/1.1\r\n\r\n")
        served.wait(lambda: len(begun) == 3)
        refused = served.get()
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "5"
        assert refused.json()["error"]["code"] == "unavailable"
        go.set()
        for peer in peers:
            peer.until(b"done")
        assert served.get().status_code == 200


def test_a_flood_of_connections_is_cut_off() -> None:
    go = threading.Event()
    begun: list[int] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        begun.append(1)
        while not go.is_set():
            await asyncio.sleep(0.01)
        await answer(send, b"done")

    with serving(work, Limits(max_connections=1)) as served:
        worker = served.peer()
        worker.send(b"GET / HTTP/1.1\r\n\r\n")
        served.wait(lambda: len(begun) == 1)
        for _ in range(400):
            served.peer()
        served.wait(lambda: "crowded" in served.ended)
        served.wait(lambda: len(served.connections) <= 1 + connections._NUM_SURPLUS)
        go.set()
        worker.until(b"done")


def test_requests_sent_ahead_are_answered_in_order_up_to_a_bound() -> None:
    calls: list[int] = []

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        calls.append(1)
        await answer(send, scope["path"].encode())

    with serving(counted, PATIENT) as served:
        polite, greedy = served.peer(), served.peer()
        polite.send(b"".join(b"GET /no%d. HTTP/1.1\r\n\r\n" % n for n in range(MAX_REQUESTS_AHEAD)))
        received = polite.until(b"/no%d." % (MAX_REQUESTS_AHEAD - 1))
        places = [received.find(b"/no%d." % n) for n in range(MAX_REQUESTS_AHEAD)]
        assert places == sorted(places)
        assert places[0] >= 0
        calls.clear()
        greedy.send(b"GET / HTTP/1.1\r\n\r\n" * 5000)
        greedy.rest()
        assert len(calls) <= MAX_REQUESTS_AHEAD + 1
    assert served.ended == ["pipelined"]


@pytest.mark.parametrize(
    "fault", [b"\0nonsense\r\n\r\n", b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nnonsense\r\n"]
)
@pytest.mark.parametrize("num_before", [1, 2, MAX_REQUESTS_AHEAD])
def test_whole_requests_before_one_that_is_refused_are_answered(num_before: int, fault: bytes) -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.01)
        await answer(send, scope["path"].encode())

    with serving(slow, PATIENT) as served:
        peer = served.peer()
        peer.send(b"".join(b"GET /no%d. HTTP/1.1\r\n\r\n" % n for n in range(num_before)) + fault)
        received = peer.rest()
    assert [received.count(b"/no%d." % n) for n in range(num_before)] == [1] * num_before
    assert received.count(b"HTTP/1.1 200") == received.count(b"HTTP/1.1") == num_before
    assert served.ended == ["malformed"]


def test_requests_sent_ahead_all_hear_that_their_client_has_gone() -> None:
    begun, left = threading.Event(), threading.Event()

    async def patient(scope: Scope, receive: Receive, send: Send) -> None:
        begun.set()
        while (await receive())["type"] != "http.disconnect":
            pass
        left.set()

    with serving(patient, PATIENT) as served:
        peer = served.peer()
        peer.send(b"GET / HTTP/1.1\r\n\r\n" * 3)
        assert begun.wait(PATIENCE_S)
        peer.close()
        assert left.wait(PATIENCE_S)


@pytest.mark.parametrize("cut", [0, 5, 40, 130])
@pytest.mark.parametrize(
    ("framing", "size"),
    [
        (b"content-length: 6\r\n\r\nabcdef", 6),
        (b"transfer-encoding: chunked\r\n\r\n6\r\nabcdef\r\n0\r\n\r\n", 6),
        (b"\r\n", 0),
    ],
)
def test_an_upgrade_that_is_offered_is_ignored_and_the_body_read(framing: bytes, size: int, cut: int) -> None:
    """Java's client offers HTTP/2 with its first request on every connection."""
    offer = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAAAAIAAAAB\r\n"
    request = b"POST / HTTP/1.1\r\n" + offer + framing
    with serving(hello, PATIENT) as served:
        peer = served.peer()
        for part in (request[:cut], request[cut:]):
            peer.send(part)
            time.sleep(0.05)
        peer.until(b"POST %d" % size)
        peer.send(b"GET / HTTP/1.1\r\n\r\n")
        peer.until(b"GET 0")


@pytest.mark.parametrize(
    "garbage", [b"\0\1\2", b"NONSENSE\r\n\r\n", b"GET http://[ HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
)
def test_what_is_no_http_is_refused_in_the_form_of_every_error(garbage: bytes) -> None:
    with serving(hello, PATIENT) as served:
        peer = served.peer()
        peer.send(garbage)
        received = peer.rest()
    assert received.startswith(b"HTTP/1.1 400 ")
    assert b'"code":"invalid_request"' in received


def test_garbage_after_a_request_does_not_get_into_its_answer() -> None:
    go = threading.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-length", b"4")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"ab", "more_body": True})
        while not go.is_set():
            await asyncio.sleep(0.01)
        await send({"type": "http.response.body", "body": b"cd"})

    with serving(slow, PATIENT) as served:
        peer = served.peer()
        peer.send(b"GET / HTTP/1.1\r\n\r\n")
        received = peer.until(b"ab")
        peer.send(b"\0garbage")
        served.wait(lambda: bool(served.ended))
        go.set()
        assert (received + peer.rest()).partition(b"\r\n\r\n")[2] == b"abcd"


def test_no_more_connections_than_the_system_has_files_for(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 2000))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: allowed.append(limits))
    assert connections._with_files(100) == 100
    assert connections._with_files(1500) == 1500
    assert connections._with_files(4096) == 2000 - connections._NUM_SURPLUS - connections._SPARE_FILES
    assert allowed == [(1500 + 384, 2000), (2000, 2000)]
