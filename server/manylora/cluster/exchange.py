"""One HTTP request on its way to a replica and its answer on the way back, in values that can be sent to a process."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from starlette.types import Message, Scope

from manylora.errors import ManyloraError

__all__ = ["Exchange", "Fetch", "Frame", "Head", "Question"]

Fetch: TypeAlias = Callable[[Any], Awaitable[bytes]]
"""From what stands for a piece of a body to its bytes."""

_MAX_PENDING_BYTES: Final = 2**20  # of an answer that nobody fetches


@dataclass(frozen=True, slots=True)
class Question:
    """A request. `key` is what routers call its adapter, empty for none; `body` are pieces, or what stands for them."""

    method: str
    path: str
    raw_path: bytes
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    scheme: str = "http"
    client: tuple[str, int] | None = None
    server: tuple[str, int | None] | None = None
    key: str = ""
    body: tuple[Any, ...] = ()

    @property
    def scope(self) -> Scope:
        """The request as ASGI has it."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": self.scheme,
            "path": self.path,
            "raw_path": self.raw_path,
            "query_string": self.query,
            "root_path": "",
            "headers": list(self.headers),
            "client": self.client,
            "server": self.server,
        }


@dataclass(frozen=True, slots=True)
class Head:
    """How an answer begins."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]


Frame: TypeAlias = Head | bytes
"""A piece of an answer; the first one is its head."""


class Exchange:
    """Between an ASGI application and whoever iterates over its answer, on one event loop.

    The application is `receive` and `send`; the other side iterates over `frames` and calls `leave` at its end.
    """

    def __init__(self, question: Question, fetch: Fetch) -> None:
        self._pieces = deque(question.body)
        self._fetch = fetch
        self._is_read = False
        self._pending: list[Frame] = []
        self._num_bytes = 0
        self._is_begun = self._is_whole = self._is_over = False
        self._gone = asyncio.Event()
        self._has_more = asyncio.Event()
        self._has_room = asyncio.Event()

    async def receive(self) -> Message:
        """The body, piece by piece; after it, that the caller has left, once that is so."""
        if self._is_read:
            await self._gone.wait()
        if self._gone.is_set():
            return {"type": "http.disconnect"}
        piece = await self._fetch(self._pieces.popleft()) if self._pieces else b""
        self._is_read = not self._pieces
        return {"type": "http.request", "body": piece, "more_body": not self._is_read}

    async def send(self, message: Message) -> None:
        """Waits while much of the answer has not been fetched. Raises OSError once the caller has left."""
        while self._num_bytes >= _MAX_PENDING_BYTES and not self._gone.is_set():
            self._has_room.clear()
            await self._has_room.wait()
        if self._gone.is_set():
            raise ConnectionResetError("The caller has left.")
        if message["type"] == "http.response.start":
            headers = tuple((bytes(name), bytes(value)) for name, value in message["headers"])
            self._pending.append(Head(message["status"], headers))
            self._is_begun = True
        elif message["type"] == "http.response.body":
            body = bytes(message.get("body", b""))
            self._pending.append(body)
            self._num_bytes += len(body)
            self._is_over = self._is_whole = not message.get("more_body", False)
        self._has_more.set()

    def end(self) -> None:
        """The application has returned."""
        self._is_over = True
        self._has_more.set()

    def leave(self) -> None:
        """Nobody iterates any more."""
        self._gone.set()
        self._has_room.set()

    async def frames(self) -> AsyncGenerator[Frame, None]:
        """The head, then the body in as few pieces as there are when they are asked for.

        Raises ManyloraError where the application returned in the middle of its answer: what there is of it is not all.
        """
        while True:
            await self._has_more.wait()
            self._has_more.clear()
            pending, self._pending, self._num_bytes = self._pending, [], 0
            is_over = self._is_over
            self._has_room.set()
            if pending and isinstance(pending[0], Head):
                yield pending.pop(0)
            body = b"".join(piece for piece in pending if isinstance(piece, bytes))
            if body:
                yield body
            if is_over:
                if self._is_begun and not self._is_whole:
                    raise ManyloraError("The server failed in the middle of this answer. The log has the details.")
                return
