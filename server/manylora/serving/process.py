"""The whole server from its settings: socket, parts, HTTP, in the order in which they can fail.

What can be refused without loading anything is refused first: the port, then the data directory, then the model.
"""

import asyncio
import ctypes
import gc
import ipaddress
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from manylora.api.state import Departure
from manylora.database.database import open_database
from manylora.errors import StartupError
from manylora.log import configure_logging
from manylora.serving.connections import Connections, Limits
from manylora.serving.http_server import DrainingServer, bind, is_loopback, make_config
from manylora.serving.parts import Parts, ServingEngine, open_parts
from manylora.serving.warm_up import to_warm_up, warm_up
from manylora.settings import Settings
from manylora.tenants.keys import KeyStore
from manylora.tenants.seal import Seal, reopened

__all__ = ["Announcement", "return_freed_memory", "safe_host", "serve", "url_of"]

_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Announcement:
    """What is worth saying once requests are answered.

    `num_other_base` adapters, beside the `num_adapters`, are for other bases. `moved_from` is the host asked
    for, where it was not used.
    """

    url: str
    model: str
    num_adapters: int
    num_other_base: int
    is_open: bool
    has_metrics: bool = True
    moved_from: str | None = None


def serve(settings: Settings, announce: Callable[[Announcement], None]) -> None:
    """Run until a signal ends it. Raises StartupError, and EngineDead once the engine has failed for good."""
    configure_logging(level=settings.log_level, as_json=settings.log_json)
    host = safe_host(settings)
    with bind(host, settings.port) as sock:
        server = _Server(settings, host, sock, announce)
        with asyncio.Runner(loop_factory=make_config(None).get_loop_factory()) as runner:
            runner.run(server.run())


def safe_host(settings: Settings) -> str:
    """The host to bind: loopback instead of the one asked for while there is no key and no --allow-open.

    Raises StartupError where the data folder says that there were keys, and there are none.
    """
    may_be_open = settings.allow_open or is_loopback(settings.host)
    was_closed = Seal(settings.data_dir).is_set()
    if may_be_open and not was_closed:
        return settings.host
    database = open_database(settings.resolved_database_url, settings.database_timeout_s)
    try:
        has_keys = bool(KeyStore(database).list())
        if was_closed and not has_keys:
            raise reopened()
        return settings.host if has_keys or may_be_open else _LOOPBACK
    finally:
        database.close()


class _Server:
    """One server process while it starts, runs and ends."""

    def __init__(
        self, settings: Settings, host: str, sock: socket.socket, announce: Callable[[Announcement], None]
    ) -> None:
        self._settings = settings
        self._host = host
        self._sock = sock
        self._announce = announce

    async def run(self) -> None:
        """Start everything, answer until a signal, and end everything in the opposite order."""
        address = url_of(self._host, self._sock.getsockname()[1])
        async with open_parts(self._settings, address=address) as parts:
            await warm_up(parts.engine, to_warm_up(parts.directory))
            # The model, its libraries and what else lives as long as the process need no looking at ever again.
            gc.collect()
            gc.freeze()
            return_freed_memory()
            await self._answer(parts)

    async def _answer(self, parts: Parts) -> None:
        settings, engine = self._settings, parts.engine
        departure = Departure()
        app = parts.app(may_run_open=settings.allow_open or is_loopback(self._host), departure=departure)
        server = DrainingServer(
            make_config(app, Connections(Limits.of(settings), parts.metrics.count_connection_ended)),
            drain=partial(self._drain, engine, departure),
            on_started=lambda: self._announce(self._announcement(parts)),
        )
        if settings.exit_on_engine_failure:
            engine.on_death(server.begin_draining)
        try:
            await server.serve(sockets=[self._sock])
        except OSError as error:
            raise StartupError(f"{self._host}:{settings.port} cannot be listened on: {error.strerror}.") from error
        if settings.exit_on_engine_failure and engine.failure is not None:
            raise engine.failure

    async def _drain(self, engine: ServingEngine, departure: Departure) -> None:
        """First nobody is sent here any more, then nobody is taken any more."""
        departure.is_near = True
        if engine.failure is None:  # or there is nothing left to be answered meanwhile
            await asyncio.sleep(self._settings.drain_delay_s)
        await engine.drain(self._settings.drain_timeout_s)

    def _announcement(self, parts: Parts) -> Announcement:
        directory = parts.catalog.directory
        return Announcement(
            url=url_of(self._host, self._sock.getsockname()[1]),
            model=parts.engine.model.name,
            num_adapters=directory.num_usable,
            num_other_base=directory.num_other_base,
            is_open=parts.gate.is_open,
            has_metrics=parts.metrics.is_on,
            moved_from=self._settings.host if self._host != self._settings.host else None,
        )


def url_of(host: str, port: int) -> str:
    """An address that a browser on this machine can open."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return f"http://{host}:{port}"
    if address.is_unspecified:
        return f"http://{_LOOPBACK}:{port}"
    return f"http://[{host}]:{port}" if address.version == 6 else f"http://{host}:{port}"


def return_freed_memory() -> None:
    """Let the system have what start-up has freed, which glibc's allocator would keep: a twelfth of a small server.

    The check of the model at start makes logits of whole vocabularies, and they lie below what stays.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)
