"""uvicorn as this program runs it: a socket taken early, and a first signal that drains before it ends."""

import asyncio
import ipaddress
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Final

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from manylora.errors import StartupError
from manylora.serving.connections import Connections, GuardedProtocol

__all__ = ["DrainingServer", "bind", "is_loopback", "make_config"]

# After draining, how long a slow reader may take to fetch what is already written; then it is cut off, and what works
# for it gets a moment to end.
_LAST_WRITES_S: Final = 5
_LAST_WORDS_S: Final = 1
# Linux's option by its number: Python has no name for it on every platform. How much the kernel may hold of an answer
# beyond what is on its way; without it a peer that does not read costs megabytes there.
_TCP_NOTSENT_LOWAT: Final = 25
_MOST_NOT_SENT: Final = 256 * 2**10


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can reach a server bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet, so that nobody connects before the model is loaded.

    Raises StartupError where the port is taken or the host is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartupError(f"The host '{host}' is not usable: {error}. Choose another with --host.") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sys.platform == "linux":  # what a listening socket has, its connections have from the start
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, _MOST_NOT_SENT)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise StartupError(
            f"Port {port} on {host} cannot be used: {error.strerror or error}. "
            "Stop what listens there or choose another with --port."
        ) from error
    sock.setblocking(False)
    return sock


def make_config(app: ASGIApp | None, connections: Connections | None = None) -> uvicorn.Config:
    """uvicorn's settings: our logging, no access log (the request line says more), httptools, uvloop, our bounds.

    Without `connections` they have the bounds that are the settings' defaults.
    """
    return uvicorn.Config(
        None if app is None else _until_cancelled(app),
        http=partial(GuardedProtocol, Connections() if connections is None else connections),
        loop="uvloop",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_LAST_WRITES_S + _LAST_WORDS_S,
    )


def _until_cancelled(app: ASGIApp) -> ASGIApp:
    """The application, whose requests nobody cancels but the server at its end: that is no error to be logged."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(asyncio.CancelledError):
            await app(scope, receive, send)

    return call


class DrainingServer(uvicorn.Server):  # type: ignore[misc]  # uvicorn is not followed by mypy here
    """The first SIGTERM or SIGINT runs `drain` while connections are still answered, then ends; a second ends now."""

    def __init__(
        self, config: uvicorn.Config, *, drain: Callable[[], Awaitable[None]], on_started: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._drain = drain
        self._on_started = on_started
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._num_signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=sockets)
        if self.started:
            self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Requests that still run when patience has ended end here, so that what they used is counted.

        Those whose client has not sent all or does not read are left by their client first, as they see it.
        """
        patience = asyncio.get_running_loop().call_later(_LAST_WRITES_S, self._hang_up)
        await super().shutdown(sockets=sockets)
        patience.cancel()
        self._hang_up()
        await asyncio.sleep(0)
        running = list(self.server_state.tasks)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _hang_up(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._num_signals += 1
        if self._num_signals > 1 or self._loop is None:
            self.force_exit = True
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self.begin_draining)

    def begin_draining(self) -> None:
        """Drain and end, as the first signal does. On the event loop."""
        self._draining = asyncio.ensure_future(self._drain_and_exit())

    async def _drain_and_exit(self) -> None:
        try:
            await self._drain()
        finally:
            self.should_exit = True
