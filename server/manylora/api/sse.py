"""Streams framed by hand, as events or as lines, and work that stops when its client leaves. Nothing else frames any.

Newer ASGI servers show a disconnect as an OSError from `send`, others only as `http.disconnect` from
`receive`; both end the work here, and the work's own `finally` cleans up.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, ClassVar, Final, TypeAlias, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from manylora.api.errors import INTERNAL_ERROR, error_json
from manylora.api.record import ClientGone
from manylora.errors import ManyloraError
from manylora.log import get_logger

__all__ = ["Event", "EventStream", "LineStream", "TypedEventStream", "while_connected"]

_log = get_logger("manylora.api")
T = TypeVar("T")

Event: TypeAlias = bytes
"""What one event carries, without a line break."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The work's result. Raises ClientGone, with the work cancelled and cleaned up, if the client leaves first."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for waiting in (task, watcher):
            waiting.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends `events`: those that are sent together, time after time.

    The status line waits for the first of them, so an error before it has its own status.

    It waits no longer than `keep_alive_s`, though: after so many seconds of silence, at the beginning or between two
    events, a comment is sent, which every reader of events skips and which tells a proxy that there is life. An error
    after the status line becomes the last events, `failed(error)`, or `data: {"error": …}` where that is not given.
    """

    media_type = "text/event-stream"
    comment: ClassVar[bytes | None] = b": keep-alive\n\n"

    def __init__(
        self,
        events: AsyncGenerator[Sequence[Event], None],
        *,
        headers: dict[str, str],
        keep_alive_s: float | None = None,
        failed: Callable[[ManyloraError], Sequence[Event]] | None = None,
    ) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self._failed = failed or _failed
        self._is_started = False
        self._is_over = False  # the last event is sent or about to be: no comment comes after it
        self._keep_alive_s = keep_alive_s
        self._sending = asyncio.Lock()  # the status line is sent before anything else
        self._sent_at = 0.0
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        if self._keep_alive_s is None or self.comment is None:
            await self._send_events(send)
        else:
            keeper = asyncio.ensure_future(self._keep_alive(send, self._keep_alive_s))
            try:
                await self._send_events(send)
            finally:
                keeper.cancel()
                await asyncio.gather(keeper, return_exceptions=True)
        await self._send(send, b"", more=False)

    async def _keep_alive(self, send: Send, every_s: float) -> None:
        """Watches beside the events, so that an event costs no timer."""
        clock = asyncio.get_running_loop().time
        self._sent_at = clock()
        while True:
            silent_s = clock() - self._sent_at
            if silent_s >= every_s:
                await asyncio.shield(self._send_comment(send))  # cut off midway, it could lack the status line
                self._sent_at, silent_s = clock(), 0.0
            await asyncio.sleep(every_s - silent_s)

    async def _send_events(self, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        try:
            async for together in self._events:
                await self._send(send, self._framed(together))
                self._sent_at = clock()
        except ManyloraError as error:
            if not self._is_started:
                raise
            await self._send_last(send, self._framed(self._failed(error)))
        except ClientGone:
            raise
        except Exception:
            if not self._is_started:
                raise
            _log.exception("stream_failed")
            await self._send_last(send, self._framed(self._failed(INTERNAL_ERROR)))
        finally:
            self._is_over = True
            await self._events.aclose()

    def _framed(self, together: Sequence[Event]) -> bytes:
        return b"".join(b"data: %b\n\n" % event for event in together)

    async def _send_last(self, send: Send, event: bytes) -> None:
        self._is_over = True
        await self._send(send, event)

    async def _send_comment(self, send: Send) -> None:
        if not self._is_over:  # begun beside the last event, it runs after it
            await self._send(send, self.comment or b"")

    async def _send(self, send: Send, payload: bytes, *, more: bool = True) -> None:
        try:
            async with self._sending:
                if not self._is_started:
                    self._is_started = True
                    await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": payload, "more_body": more})
        except OSError as error:
            raise ClientGone from error


def _failed(error: ManyloraError) -> Sequence[Event]:
    return (error_json(error),)


class TypedEventStream(EventStream):
    """Sends events under names: each one's data is JSON that begins with its `type`, which is the name, too."""

    def _framed(self, together: Sequence[Event]) -> bytes:
        return b"".join(b"event: %b\ndata: %b\n\n" % (_type_of(event), event) for event in together)


_TYPE: Final = b'{"type":"'


def _type_of(event: Event) -> bytes:
    return event[len(_TYPE) : event.index(b'"', len(_TYPE))]


class LineStream(EventStream):
    """Sends each event's data as a line of its own (NDJSON), which has no comments."""

    media_type = "application/x-ndjson"
    comment = None

    def _framed(self, together: Sequence[Event]) -> bytes:
        return b"".join(b"%b\n" % event for event in together)
