"""Connections with bounds: uvicorn's HTTP protocol, guarded before, beside and after what its parser sees.

uvicorn bounds the idle time between requests and what it buffers of a body. It does not bound the length of a header
(which httptools joins anew with every packet), the time that a header or a body may take, how many requests are sent
ahead, how many connections there are, or how long a peer may leave its answer unread. All of that is here.

What is read of a connection is in one of these phases. Each but ANSWER has a time that it may take:

    IDLE  no byte of a request        HEADER  from its first byte        BODY  until its last one
    ANSWER  a request is complete     REFUSED  what comes is dropped; the connection ends with what is being sent
"""

import asyncio
import fcntl
import resource
import struct
import termios
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, Self

import httptools
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from manylora.api.errors import error_response
from manylora.errors import HeaderTooLarge, InvalidRequest, ManyloraError, RequestTimeout, Unavailable
from manylora.log import get_logger
from manylora.settings import Settings

__all__ = ["MAX_HEADERS", "MAX_HEADER_BYTES", "MAX_REQUESTS_AHEAD", "Connections", "GuardedProtocol", "Limits"]

MAX_HEADER_BYTES: Final = 32 * 2**10
MAX_HEADERS: Final = 128
MAX_REQUESTS_AHEAD: Final = 16
MIN_BODY_BYTES_PER_S: Final = 1024
MIN_ANSWER_BYTES_PER_S: Final = 1024

_SLICE: Final = 64 * 2**10  # most that the parser is given between two looks at the bounds
# How long what nobody wants is read and dropped, so that a client which sends first and reads then gets its answer.
_DROP_S: Final = 5.0
# Connections above the most there may be that still get an answer, a 503, before others are cut off at once.
_NUM_SURPLUS: Final = 128
_BUSY_RETRY_S: Final = 5.0
# Files, the database and the adapters' store need descriptors too.
_SPARE_FILES: Final = 256

_log = get_logger("manylora.serving.connections")


def _default(name: str) -> Any:
    return Settings.model_fields[name].default


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds that are settings of the same names."""

    max_connections: int = _default("max_connections")
    header_timeout_s: float = _default("header_timeout_s")
    body_timeout_s: float = _default("body_timeout_s")
    idle_timeout_s: float = _default("idle_timeout_s")
    write_timeout_s: float = _default("write_timeout_s")

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """As set, with no more connections than the system lets this process have open files."""
        return cls(
            max_connections=_with_files(settings.max_connections),
            header_timeout_s=settings.header_timeout_s,
            body_timeout_s=settings.body_timeout_s,
            idle_timeout_s=settings.idle_timeout_s,
            write_timeout_s=settings.write_timeout_s,
        )


def _with_files(max_connections: int) -> int:
    """Raise the limit on open files where that is allowed; gives how many connections there may then be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    others = _NUM_SURPLUS + _SPARE_FILES
    if soft == resource.RLIM_INFINITY or soft >= max_connections + others:
        return max_connections
    files = max_connections + others if hard == resource.RLIM_INFINITY else min(max_connections + others, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    except (OSError, ValueError):
        files = soft
    allowed = max(1, files - others)
    if allowed < max_connections:
        _log.warning("fewer_connections", max_connections=max_connections, allowed=allowed, open_files=files)
    return min(allowed, max_connections)


@dataclass(slots=True, eq=False)
class Connections:
    """All connections of one server. `on_ended` hears why one was ended by a bound."""

    limits: Limits = field(default_factory=Limits)
    on_ended: Callable[[str], None] = lambda _: None
    _open: set["GuardedProtocol"] = field(default_factory=set)
    _waiting: dict["GuardedProtocol", None] = field(default_factory=dict)  # no request runs on them, longest first

    def __len__(self) -> int:
        return len(self._open)

    def add(self, one: "GuardedProtocol") -> bool:
        """Whether there is room. Where there is none, the connection that has waited longest for its client goes."""
        if len(self._open) >= self.limits.max_connections:
            longest = next(iter(self._waiting), None)
            if longest is not None:
                self.discard(longest)
                longest.give_way()
        self._open.add(one)
        self._waiting[one] = None
        return len(self._open) <= self.limits.max_connections

    @property
    def is_flooded(self) -> bool:
        """More surplus connections than are answered."""
        return len(self._open) > self.limits.max_connections + _NUM_SURPLUS

    def discard(self, one: "GuardedProtocol") -> None:
        self._open.discard(one)
        self._waiting.pop(one, None)

    def wait(self, one: "GuardedProtocol") -> None:
        """No request runs on this connection any more."""
        if one in self._open:
            self._waiting[one] = None

    def work(self, one: "GuardedProtocol") -> None:
        """A request of this connection runs."""
        self._waiting.pop(one, None)


class _Phase(Enum):
    IDLE = "idle"
    HEADER = "header"
    BODY = "body"
    ANSWER = "answer"
    REFUSED = "refused"


class GuardedProtocol(HttpToolsProtocol):  # type: ignore[misc]  # uvicorn is not followed by mypy here
    """One connection. uvicorn makes one for each, with its own keyword arguments beside `others`.

    uvicorn's keep-alive timer covers IDLE. `_reading` covers HEADER, BODY and REFUSED, and is set only where a packet
    ends within one: a request that comes at once costs no timer. `_writing` runs while the peer does not read.
    """

    def __init__(self, others: Connections, **of_uvicorn: Any) -> None:
        super().__init__(**of_uvicorn)
        self._others = others
        self._limits = others.limits
        self.timeout_keep_alive = others.limits.idle_timeout_s
        self._phase = _Phase.IDLE
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._unread = 0  # bytes that the peer had not taken when `_writing` was set
        self._body_bytes = 0  # that came since `_reading` was set
        self._silent_bytes = 0  # since the parser last told of anything but headers
        self._head_bytes, self._num_headers = 0, 0  # of the request that is read
        self._running: Any = None  # the cycle that is answered; `cycle` is the one that is read
        self._is_upgrade = False  # of the request that is read
        self._is_muted = False  # the parser is told what is known

    # the connection

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        has_room = self._others.add(self)
        if self._others.is_flooded:
            self._cut("crowded")
            return
        if not has_room:
            self.app = _busy
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        self._others.discard(self)
        self._stop_reading()
        self._stop_writing()
        self._unset_keepalive_if_required()
        # uvicorn tells the newest request only; with requests sent ahead that is not the one being answered.
        for cycle in (self._running, *(cycle for cycle, _ in self.pipeline)):
            _disconnect(cycle)
        self.pipeline.clear()
        super().connection_lost(exc)

    def give_way(self) -> None:
        """Close to make room, while no request runs."""
        self._tell("crowded")
        self._close()

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():
            self._watch_writing()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def _close(self) -> None:
        """Close once all is written, which the peer has only a while to read."""
        self._unset_keepalive_if_required()
        self._stop_reading()
        if not self.transport.is_closing():
            self.transport.close()
        self._watch_writing()

    def _cut(self, reason: str) -> None:
        self._tell(reason)
        self.transport.abort()

    def _tell(self, reason: str) -> None:
        self._others.on_ended(reason)
        _log.debug("connection_ended", reason=reason, client=self.client[0] if self.client else None)

    @property
    def _is_refused(self) -> bool:
        return self._phase is _Phase.REFUSED

    # what comes in

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        if len(data) <= _SLICE:
            self._read(data)
        else:
            view = memoryview(data)
            for start in range(0, len(data), _SLICE):
                self._read(view[start : start + _SLICE])
                if self._is_refused or self.transport.is_closing():
                    return
        if self._reading is None:
            self._watch_reading()

    def _read(self, data: bytes | memoryview) -> None:
        self._silent_bytes += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self._refuse("malformed", InvalidRequest("This is not a valid HTTP request."))
            return
        # The parser keeps an unfinished header, trailer or chunk extension and joins it anew with each packet.
        if self._silent_bytes > MAX_HEADER_BYTES and self._phase in (_Phase.HEADER, _Phase.BODY):
            self._refuse_header()

    def _feed(self, data: bytes | memoryview) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # No other protocol is spoken here. The parser takes the body for the other one's; another reads it on.
            self._ignore_upgrade()
            rest = data[upgrade.args[0] :]
            if rest:
                self._feed(rest)

    def _ignore_upgrade(self) -> None:
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        framing = [header for header in self.headers if header[0] in (b"content-length", b"transfer-encoding")]
        self._is_upgrade, self._is_muted = False, True
        self.parser.feed_data(b"POST / HTTP/1.1\r\n" + b"".join(b"%b: %b\r\n" % header for header in framing) + b"\r\n")
        self._is_muted = False

    # what the parser tells

    def on_message_begin(self) -> None:
        if self._is_muted or self._is_refused:
            return
        self._unset_keepalive_if_required()
        self._phase = _Phase.HEADER
        self._silent_bytes = self._head_bytes = self._num_headers = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if self._is_muted or self._is_refused:
            return
        self._head_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_muted or self._phase is not _Phase.HEADER:
            return  # a trailer says nothing that is asked for
        self._num_headers += 1
        self._head_bytes += len(name) + len(value)
        if self._num_headers <= MAX_HEADERS:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._is_muted or self._is_refused:
            return
        self._unset_keepalive_if_required()
        self._stop_reading()
        if self._head_bytes > MAX_HEADER_BYTES or self._num_headers > MAX_HEADERS:
            self._refuse_header()
        elif len(self.pipeline) >= MAX_REQUESTS_AHEAD:
            message = f"More than {MAX_REQUESTS_AHEAD} requests were sent ahead of their answers."
            self._refuse("pipelined", InvalidRequest(message))
        else:
            self._phase, self._silent_bytes = _Phase.BODY, 0
            self._is_upgrade = self.parser.should_upgrade()
            self._others.work(self)
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self._phase is not _Phase.REFUSED:
            self._silent_bytes = 0
            self._body_bytes += len(body)
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._is_refused or self._is_upgrade:
            return
        self._stop_reading()
        self._silent_bytes = 0
        if self.cycle.response_complete:
            self._rest()
        else:
            self._phase = _Phase.ANSWER
        super().on_message_complete()

    # what goes out

    def _start_asgi_task(self, cycle: Any, app: ASGIApp) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        is_last = not self.pipeline
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_writing()
        elif is_last and self._phase is _Phase.ANSWER:
            self._rest()
        elif is_last and self._phase is _Phase.BODY:  # nobody wants the rest of it
            self._stop_reading()
            self._watch_reading()

    def _rest(self) -> None:
        self._phase = _Phase.IDLE
        self._others.wait(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_writing()

    # time

    def _watch_reading(self) -> None:
        match self._phase:
            case _Phase.HEADER:
                seconds = self._limits.header_timeout_s
            case _Phase.BODY:
                seconds = _DROP_S if self.cycle.response_complete else self._limits.body_timeout_s
            case _Phase.REFUSED:
                seconds = _DROP_S
            case _:
                return
        self._body_bytes = 0
        self._reading = self.loop.call_later(seconds, self._on_reading_time)

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _on_reading_time(self) -> None:
        self._reading = None
        wanted = MIN_BODY_BYTES_PER_S * self._limits.body_timeout_s
        if self._is_refused:
            self.transport.abort()
        elif self._phase is _Phase.BODY and self.cycle.response_complete:
            self._close()
        elif self.flow.read_paused or (self._phase is _Phase.BODY and self._body_bytes >= wanted):
            self._watch_reading()  # while reading is paused the client waits for us
        elif self._phase is _Phase.HEADER:
            seconds = self._limits.header_timeout_s
            message = f"The request's header was not complete within {seconds:g} s. Send it at once."
            self._refuse("slow_header", RequestTimeout(message))
        else:
            message = f"The body came slower than {MIN_BODY_BYTES_PER_S} bytes a second. Send the request again."
            self._refuse("slow_body", RequestTimeout(message))

    def _watch_writing(self) -> None:
        if self._writing is None:
            self._unread = _num_unread(self.transport)
            self._writing = self.loop.call_later(self._limits.write_timeout_s, self._on_writing_time)

    def _stop_writing(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def _on_writing_time(self) -> None:
        self._writing = None
        wanted = MIN_ANSWER_BYTES_PER_S * self._limits.write_timeout_s
        if self._unread - _num_unread(self.transport) >= wanted:
            self._watch_writing()
        else:
            self._cut("unread_answer")

    # refusals

    def _refuse_header(self) -> None:
        message = f"The request's header is longer than {MAX_HEADER_BYTES} bytes or has more than {MAX_HEADERS} lines."
        self._refuse("long_header", HeaderTooLarge(message))

    def _refuse(self, reason: str, error: ManyloraError) -> None:
        """Answer what no route can answer, and end the connection. Whole requests before it are answered instead."""
        self._tell(reason)
        self._unset_keepalive_if_required()
        self._stop_reading()
        if self.pipeline and self.pipeline[0][0].more_body:
            self.pipeline.popleft()  # the newest, which is cut short
        running = self._running
        self._phase = _Phase.REFUSED
        if running is not None and not running.response_complete:
            if not running.more_body:
                last = self.pipeline[0][0] if self.pipeline else running
                last.keep_alive = False
                return
            if running.response_started:
                self.transport.abort()
                return
            _disconnect(running)
        self._others.wait(self)
        self.transport.write(_as_bytes(error))
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._watch_reading()


def _disconnect(cycle: Any) -> None:
    """Let the application see that its client has gone."""
    if cycle is not None and not cycle.response_complete:
        cycle.disconnected = True
        cycle.message_event.set()


def _num_unread(transport: asyncio.Transport) -> int:
    """Bytes that were written and that the peer's system has not acknowledged."""
    waiting = transport.get_write_buffer_size()
    try:
        queued = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, b"\0" * 4)
    except (OSError, AttributeError):
        return waiting
    return waiting + int(struct.unpack("i", queued)[0])


def _as_bytes(error: ManyloraError) -> bytes:
    """The whole answer of a connection that ends with it."""
    response = error_response(error, headers={"connection": "close"})
    lines = b"".join(b"%b: %b\r\n" % header for header in response.raw_headers)
    return b"".join((STATUS_LINE[error.status], lines, b"\r\n", response.body))


async def _busy(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers in the application's place on a connection too many."""
    error = Unavailable("The server has as many connections as it may have.", retry_after_s=_BUSY_RETRY_S)
    await error_response(error, scope, headers={"connection": "close"})(scope, receive, send)
