"""Layers around the routes, in plain ASGI, from the outermost to the innermost: all that is done for every request.

Small differences between clients that make no difference to an answer are made even here.
"""

import asyncio
import re
import time
import uuid
from collections.abc import Callable
from typing import Any, Final

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from manylora.api.errors import INTERNAL_ERROR, error_response
from manylora.api.origins import OpenRules
from manylora.api.record import ClientGone
from manylora.errors import TooLarge, UnsupportedEncoding, quoted
from manylora.log import get_logger
from manylora.tenants.presence import Presence, Visit

__all__ = [
    "POLLED_PATHS",
    "REQUEST_ID_HEADER",
    "AnyMethodAndEncoding",
    "BodyLimit",
    "CanonicalPath",
    "LastResort",
    "OpenGuard",
    "RequestContext",
]

REQUEST_ID_HEADER: Final = "x-request-id"
_SANE_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# Asked for every few seconds by machines; their lines are for debugging only, and they are not traced.
POLLED_PATHS: Final = frozenset({"/health", "/ready", "/ping", "/metrics", "/metrics/router", "/v1/stats"})
# Pages whose links are relative to them: a slash more would break those, so they redirect.
_PAGES: Final = frozenset({"/", "/dashboard/", "/docs/"})
_DISCARD_BYTES: Final = 256 * 2**20
_DISCARD_S: Final = 10.0

_log = get_logger("manylora.request")


class CanonicalPath:
    """Takes a proxy's path prefix and a trailing slash off the path, for everything inside."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self.app = app
        self._prefix = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            if self._prefix and (path == self._prefix or path.startswith(f"{self._prefix}/")):
                path = path[len(self._prefix) :] or "/"
            if path.endswith("/") and path not in _PAGES:
                path = path[:-1]
            if path != scope["path"]:
                scope = {**scope, "path": path, "raw_path": path.encode()}
        await self.app(scope, receive, send)


class RequestContext:
    """Gives every request an id (a sane one from the client is kept) and one log line, and has it counted.

    `count(method, path template, status)` hears of each when it has ended; see `Metrics.count_answer`.

    Other lines that are written on the request's behalf have the id too.

    Routes add to the line through `scope["manylora.log"]`; the id is `scope["manylora.request_id"]`.
    """

    def __init__(self, app: ASGIApp, count: Callable[[str, str | None, int | None], None]) -> None:
        self.app = app
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        scope["manylora.request_id"] = request_id
        fields: dict[str, Any] = scope.setdefault("manylora.log", {})
        header = (REQUEST_ID_HEADER.encode(), request_id.encode())
        status: list[int] = scope.setdefault("manylora.status", [])  # empty until the answer has begun

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                status.append(message["status"])
                message["headers"] = [*message.get("headers", []), header]
            await send(message)

        started = time.perf_counter()
        try:
            with bound_contextvars(request_id=request_id):
                await self.app(scope, receive, send_with_id)
        except (ClientGone, ClientDisconnect):
            fields.setdefault("outcome", "cancelled")
        finally:
            answered = status[0] if status else None
            route = scope.get("route")
            self._count(scope["method"], None if route is None else route.path_format, answered)
            self._write(scope, request_id, answered, time.perf_counter() - started, fields)

    def _write(self, scope: Scope, request_id: str, status: int | None, seconds: float, fields: dict[str, Any]) -> None:
        write = _log.debug if scope["path"] in POLLED_PATHS else _log.info
        write(
            "request",
            request_id=request_id,
            method=scope["method"],
            path=quoted(scope["path"]),
            status=status,
            duration_ms=round(seconds * 1000, 1),
            **fields,
        )


class LastResort:
    """Answers what nobody foresaw with a 500 that tells nothing of its inside, and logs it. Inside RequestContext."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except (ClientGone, ClientDisconnect):
            raise
        except Exception:  # noqa: BLE001 - the outermost handler
            _log.exception("unexpected_error", request_id=scope["manylora.request_id"], path=quoted(scope["path"]))
            if not scope["manylora.status"]:
                await error_response(INTERNAL_ERROR, scope)(scope, receive, send)


class OpenGuard:
    """While `is_open()`, refuses what a page of another site may have made a browser send."""

    def __init__(self, app: ASGIApp, *, is_open: Callable[[], bool], rules: OpenRules) -> None:
        self.app = app
        self._is_open = is_open
        self._rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fault = self._rules.fault(scope) if scope["type"] == "http" and self._is_open() else None
        if fault is None:
            await self.app(scope, receive, send)
        else:
            scope["manylora.log"]["code"] = fault.code
            await error_response(fault, scope)(scope, receive, send)


class AnyMethodAndEncoding:
    """Answers HEAD wherever GET is answered, and refuses bodies that are encoded."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        encoding = Headers(scope=scope).get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            error = UnsupportedEncoding(f"Send the body as it is, not with content-encoding '{quoted(encoding)}'.")
            scope["manylora.log"]["code"] = error.code
            await error_response(error, scope)(scope, receive, send)
        elif scope["method"] == "HEAD":
            got = {**scope, "method": "GET"}
            await self.app(got, receive, _without_bodies(send))
            scope["route"] = got.get("route")
        else:
            await self.app(scope, receive, send)


def _without_bodies(send: Send) -> Send:
    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return send_head


class BodyLimit:
    """Refuses a body over its limit with 413, before it is in memory, and counts those that are in memory.

    `limit_of(scope)` gives the limit in bytes, `is_streamed(scope)` says that the body goes to disk as it comes. A body
    whose length is announced is refused unread; the answer goes out at once and the body is then read and dropped for
    a while, so that a client which sends all of it first still gets to the answer.
    """

    def __init__(
        self, app: ASGIApp, limit_of: Callable[[Scope], int], is_streamed: Callable[[Scope], bool], presence: Presence
    ) -> None:
        self.app = app
        self._limit_of = limit_of
        self._is_streamed = is_streamed
        self._presence = presence

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self._limit_of(scope)
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdigit() and int(announced) > limit:
            await self._refuse(limit, scope, receive, send)
            return
        num_bytes, is_held = 0, not self._is_streamed(scope)
        visit: Visit = scope.setdefault("manylora.visit", Visit())

        async def receive_limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            size = len(message.get("body", b""))
            num_bytes += size
            if num_bytes > limit:
                raise _too_large(limit)
            if is_held and size:
                self._presence.hold(visit, size)
            return message

        try:
            await self.app(scope, receive_limited, send)
        finally:
            self._presence.leave(visit)

    async def _refuse(self, limit: int, scope: Scope, receive: Receive, send: Send) -> None:
        response = error_response(_too_large(limit), scope, headers={"connection": "close"})
        await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": response.body, "more_body": True})
        try:
            async with asyncio.timeout(_DISCARD_S):
                await _discard(receive)
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _discard(receive: Receive) -> None:
    num_bytes = 0
    while num_bytes < _DISCARD_BYTES:
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False):
            return


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"The body is larger than {limit} bytes, the limit here. Send less, or raise the server's limit.")
