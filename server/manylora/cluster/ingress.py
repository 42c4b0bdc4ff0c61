"""The way into a cluster: reads a request, asks a replica, hands on the answer, and asks another where one ended.

It knows no key, no adapter and no model. What a request names is a word to it, and equal words go together.
"""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import ExitStack, aclosing, contextmanager, suppress
from dataclasses import replace
from hashlib import blake2b
from typing import Any, Final

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from manylora.api.errors import INTERNAL_ERROR, error_json, error_response
from manylora.api.record import ClientGone
from manylora.api.sse import while_connected
from manylora.cluster.exchange import Frame, Head, Question
from manylora.errors import (
    AuthenticationFailed,
    CrossSite,
    InvalidSettings,
    ManyloraError,
    PermissionDenied,
    RateLimited,
    ReplicaLost,
    RequestTimeout,
)
from manylora.log import get_logger
from manylora.serving.app import inference_routes, upload_limits
from manylora.serving.connections import MIN_BODY_BYTES_PER_S
from manylora.settings import Settings
from manylora.tenants.presence import Presence, Visit

__all__ = ["Ask", "HandedOn", "Ingress", "key_of"]

Ask = Callable[[Question], AsyncGenerator[Frame, None]]
"""Sends a question to some replica and gives its answer. Raises ReplicaLost where that one has ended."""

MAX_UPLOADS: Final = 4  # of one key at a time
_MAX_TRIES: Final = 4
_MAX_NAME: Final = 300
_PIECE_BYTES: Final = 4 * 2**20
_UNASKED_BYTES: Final = 64 * 2**10  # of a body, before its sender has shown a key that is known
# What is asked with a sender's key before more of the body is read. The latter answers whoever may upload.
_FOR_ALL: Final = ("/v1/stats", b"")
_FOR_UPLOADS: Final = ("/v1/files", b"limit=1")
_REFUSALS: Final[Mapping[str, type[ManyloraError]]] = {
    error.code: error for error in (AuthenticationFailed, PermissionDenied, CrossSite, RateLimited)
}
_CREDENTIALS: Final = frozenset({b"authorization", b"x-api-key", b"host"})
_NOBODY: Final = 499  # nobody reads it
_log = get_logger("manylora.cluster")


def key_of(body: bytes, headers: Mapping[str, str]) -> str:
    """What routers call the adapter that a body of JSON names; empty where it names none.

    Names belong to tenants, which the ingress does not know: two keys' adapters of one name are told apart by the keys.
    """
    try:
        said = orjson.loads(body)
    except orjson.JSONDecodeError:
        return ""
    if not isinstance(said, dict):
        return ""
    name = next((said[each] for each in ("adapter_id", "model") if isinstance(said.get(each), str)), "")
    if not 0 < len(name) <= _MAX_NAME:
        return ""
    if "/" in name:
        return name
    return f"{_sender_of(headers)}/{name}"


def _sender_of(headers: Mapping[str, str]) -> str:
    """The key of a request in other words: the same ones however its header is written."""
    given = headers.get("authorization") or headers.get("x-api-key") or ""
    return blake2b("".join(given.split()[-1:]).encode(), digest_size=8).hexdigest()


class Ingress:
    """Answers HTTP requests by asking replicas. `keep` turns a piece of a large body into what stands for it."""

    def __init__(self, ask: Ask, settings: Settings, *, keep: Callable[[bytes], Any] = bytes) -> None:
        if isinstance(settings.max_body, float) or isinstance(settings.max_body_memory, float):
            raise InvalidSettings("max_body and max_body_memory are sizes in bytes in a cluster.")
        self._ask = ask
        self._keep = keep
        self._max_body = settings.max_body
        self._body_timeout_s = settings.body_timeout_s
        self._upload_limits = upload_limits(settings)
        self._repeatable = inference_routes()
        self._root_path = settings.root_path
        self._presence = Presence(
            max_requests=settings.max_tenant_requests or max(1, settings.max_connections // 2),
            max_bytes=max(settings.max_body_memory, 2 * settings.max_body),
        )
        self._uploads: Counter[str] = Counter()

    async def __call__(self, request: Request) -> Response:
        """The answer, whose beginning is there; the rest comes while it is sent."""
        with ExitStack() as held:
            try:
                question = await self._read(request, held)
                return await self._answered(question, request)
            except RequestTimeout as error:
                return error_response(error, request.scope, headers={"connection": "close"})
            except ManyloraError as error:
                return error_response(error, request.scope)
            except (ClientDisconnect, ClientGone):
                return Response(status_code=_NOBODY)

    # the question

    async def _read(self, request: Request, held: ExitStack) -> Question:
        """Whole; what it takes up is in `held`. Raises RequestTimeout, what a replica refuses a key with, ReplicaLost.

        Bodies in memory count as their sender's, and before a key is asked for all together as those of one more.
        Where these are too many, or one is more than small, a replica is asked about its key before more is read.
        Raises RateLimited and Unavailable where too much is in memory.
        """
        question = _question(request)
        route = question.method, question.path.removeprefix(self._root_path).removesuffix("/")
        limit = self._upload_limits.get(route, self._max_body)
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > limit:
            return question  # the replica refuses it by its length, in the words of the route
        is_upload = route in self._upload_limits
        visit = Visit()
        held.callback(self._presence.leave, visit)
        pieces: list[Any] = []
        rest = bytearray()
        num_bytes = 0
        async with aclosing(self._paced(request)) as chunks:
            async for chunk in chunks:
                num_bytes += len(chunk)
                if num_bytes > limit:
                    return _announcing(question, num_bytes)
                is_much = num_bytes > _UNASKED_BYTES or not self._presence.has_room(visit, len(chunk))
                if is_much and visit.tenant is None:
                    sender = _sender_of(request.headers)
                    await self._check_key(question, *(_FOR_UPLOADS if is_upload else _FOR_ALL))
                    self._presence.enter(visit, sender)
                    if is_upload:
                        held.enter_context(self._upload(sender))
                if visit.tenant is None or not is_upload:
                    self._presence.hold(visit, len(chunk))
                rest += chunk
                while is_upload and len(rest) >= _PIECE_BYTES:
                    pieces.append(self._keep(bytes(rest[:_PIECE_BYTES])))
                    del rest[:_PIECE_BYTES]
        body = bytes(rest)
        key = "" if is_upload else key_of(body, request.headers)
        return replace(question, key=key, body=(*pieces, *((body,) if body else ())))

    async def _paced(self, request: Request) -> AsyncGenerator[bytes, None]:
        """The body as it comes. Raises RequestTimeout where it comes slower than a server lets it."""
        loop, chunks = asyncio.get_running_loop(), request.stream()
        num_bytes, left_s = 0, self._body_timeout_s
        while True:
            begun = loop.time()
            try:
                async with asyncio.timeout(left_s):
                    chunk = await anext(chunks, None)
            except TimeoutError:
                raise RequestTimeout(
                    f"The body came slower than {MIN_BODY_BYTES_PER_S} bytes a second. Send the request again."
                ) from None
            if chunk is None:
                return
            left_s -= loop.time() - begun  # only the time in which the client was waited for
            num_bytes += len(chunk)
            if num_bytes >= MIN_BODY_BYTES_PER_S * self._body_timeout_s:
                num_bytes, left_s = 0, self._body_timeout_s
            yield chunk

    @contextmanager
    def _upload(self, sender: str) -> Iterator[None]:
        """Raises RateLimited beyond those that a key may send at a time."""
        if self._uploads[sender] >= MAX_UPLOADS:
            raise RateLimited(f"{MAX_UPLOADS} uploads with this key are being sent. Wait for one of them.")
        self._uploads[sender] += 1
        try:
            yield
        finally:
            self._uploads[sender] -= 1
            if not self._uploads[sender]:
                del self._uploads[sender]

    async def _check_key(self, question: Question, path: str, query: bytes) -> None:
        """Raises AuthenticationFailed, PermissionDenied or RateLimited as a replica does that is asked this."""
        headers = tuple(each for each in question.headers if each[0] in _CREDENTIALS)
        path = f"{self._root_path}{path}"
        asked = replace(question, method="GET", path=path, raw_path=path.encode(), query=query, headers=headers)
        async with aclosing(self._ask(asked)) as frames:
            async for frame in frames:
                if not isinstance(frame, Head) or frame.status not in (401, 403, 429):
                    return
                said = orjson.loads(b"".join([piece async for piece in frames if isinstance(piece, bytes)]))["error"]
                if (refusal := _REFUSALS.get(said["code"])) is not None:
                    raise refusal(said["message"])

    # the answer

    async def _answered(self, question: Question, request: Request) -> Response:
        """The answer of the first replica that lives long enough to begin one."""
        for attempt in range(_MAX_TRIES):
            frames = self._ask(question)
            try:
                head = await while_connected(request.receive, anext(frames, None))
            except ReplicaLost:
                _log.warning("replica_lost", path=question.path, attempt=attempt)
                if not self._may_repeat(question):
                    raise ReplicaLost(
                        "The replica that worked on this has ended. Look whether it was done before you send it again."
                    ) from None
                continue
            except BaseException:
                await frames.aclose()
                raise
            if isinstance(head, Head):
                return HandedOn(head, frames)
            return error_response(INTERNAL_ERROR, request.scope)  # it raised before it had answered
        raise ReplicaLost("No replica could answer. Try again.")

    def _may_repeat(self, question: Question) -> bool:
        """Whether a question that may have been answered once can be asked again: it changes nothing."""
        path = question.path.removeprefix(self._root_path)
        return question.method in ("GET", "HEAD") or (question.method, path) in self._repeatable


class HandedOn(Response):
    """An answer as a replica gives it. Where that one ends midway, a stream gets a last event that says so."""

    def __init__(self, head: Head, frames: AsyncGenerator[Frame, None]) -> None:
        self.status_code = head.status
        self.raw_headers = list(head.headers)
        self.background = None
        self._frames = frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGone):
            await while_connected(receive, self._send_all(scope, send))

    async def _send_all(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        last = b""
        try:
            async with aclosing(self._frames):
                async for frame in self._frames:
                    if isinstance(frame, bytes):
                        last = frame
                        await send({"type": "http.response.body", "body": frame, "more_body": True})
        except ReplicaLost as error:
            kind = dict(self.raw_headers).get(b"content-type", b"").partition(b";")[0]
            if kind not in _STREAMS:
                raise  # half of a file is no file: the connection breaks off
            _log.warning("replica_lost", path=scope["path"], is_begun=True)
            body = _event(error, kind, scope, last)
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


_STREAMS: Final = (b"text/event-stream", b"application/x-ndjson")
_NUMBER: Final = re.compile(rb'"sequence_number":([0-9]+)')


def _event(error: ManyloraError, kind: bytes, scope: Scope, last: bytes) -> bytes:
    """The last event of a stream, in the words of its route; `last` is what was sent before it."""
    said = error_json(error, scope)
    if kind == b"application/x-ndjson":
        return said + b"\n"
    if scope["path"].endswith("/v1/messages"):
        return b"event: error\ndata: %b\n\n" % said
    if numbers := _NUMBER.findall(last):
        told = {"type": "error", "sequence_number": int(numbers[-1]) + 1, "code": error.code}
        said = orjson.dumps({**told, "message": error.message, "param": None})
        return b"event: error\ndata: %b\n\n" % said
    return b"data: %b\n\n" % said


def _question(request: Request) -> Question:
    """Without its body."""
    scope = request.scope
    return Question(
        scope["method"],
        scope["path"],
        scope.get("raw_path") or scope["path"].encode(),
        scope["query_string"],
        tuple((bytes(name), bytes(value)) for name, value in scope["headers"]),
        scheme=scope.get("scheme", "http"),
        client=None if scope.get("client") is None else tuple(scope["client"]),
        server=None if scope.get("server") is None else tuple(scope["server"]),
    )


def _announcing(question: Question, num_bytes: int) -> Question:
    """The question with the length that its body has at least, for a replica to refuse it by."""
    others = (each for each in question.headers if each[0] not in (b"content-length", b"transfer-encoding"))
    return replace(question, headers=(*others, (b"content-length", str(num_bytes).encode())))
