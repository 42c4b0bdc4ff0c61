"""The whole server from its settings: socket, base, catalog, engine, HTTP, in the order in which they can fail.

What can be refused without loading anything is refused first: the port, then the data directory, then the model.
"""

import asyncio
import gc
import ipaddress
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from manylora.api import adapters, dashboard_routes, inspection
from manylora.api import usage as usage_routes
from manylora.api.inspection import Inspect
from manylora.api.state import Departure
from manylora.api.tracing import open_tracing
from manylora.catalog.service import Catalog
from manylora.database.database import open_database
from manylora.errors import StartupError
from manylora.identity import PUBLIC_TENANT, AdapterRef
from manylora.log import configure_logging
from manylora.lora.memory.occupancy import Occupancy
from manylora.metrics import Metrics, NoMetrics
from manylora.serving.app import create_app
from manylora.serving.connections import Connections, Limits
from manylora.serving.http_server import DrainingServer, bind, is_loopback, make_config
from manylora.serving.warm_up import warm_up
from manylora.settings import Settings
from manylora.tenants.gate import TenantGate
from manylora.tenants.keys import KeyStore
from manylora.tenants.seal import Seal, reopened
from manylora.usage.interface import UsageSink
from manylora.usage.ledger import UsageLedger

if TYPE_CHECKING:
    from manylora.engine.async_engine import AsyncEngine

__all__ = ["Announcement", "safe_host", "serve", "url_of"]

_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Announcement:
    """What is worth saying once requests are answered.

    `num_other_base` adapters, beside the `num_adapters`, cannot be used with this base. `moved_from` is the host asked
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
    """The parts of one server process while it starts, runs and ends."""

    def __init__(
        self, settings: Settings, host: str, sock: socket.socket, announce: Callable[[Announcement], None]
    ) -> None:
        self._settings = settings
        self._host = host
        self._sock = sock
        self._announce = announce
        self._metrics = Metrics() if settings.metrics else NoMetrics()
        self._tracing = open_tracing(settings)

    async def run(self) -> None:
        """Start everything, answer until a signal, and end everything in the opposite order."""
        from manylora.engine.build import EngineBuilder  # not before the port is ours: torch takes seconds to import
        from manylora.lifecycle.weights.served import Inspector
        from manylora.models.loading import load_base
        from manylora.models.stored_weights import StoredWeights

        settings = self._settings
        base = load_base(settings)
        builder = EngineBuilder(settings, base)
        inspector = Inspector(base.folder, builder.modules)
        async with AsyncExitStack() as stack:
            if self._tracing is not None:
                stack.push_async_callback(asyncio.to_thread, self._tracing.close)
            catalog = Catalog.open(
                settings, builder.modules, StoredWeights(base.folder, builder.modules), base_name=base.name
            )
            stack.push_async_callback(catalog.aclose)
            gate = TenantGate(catalog.database, Seal(settings.data_dir, catalog.store))
            occupancy = Occupancy()
            journals = settings.data_dir / "usage"
            usage = UsageLedger(catalog.database, occupancy, journals, wait_s=settings.usage_wait_s)
            usage.start()
            stack.push_async_callback(usage.aclose)
            engine = builder.build(catalog, self._metrics, occupancy)
            await engine.start()
            stack.push_async_callback(engine.close)
            gate.start()
            stack.push_async_callback(gate.aclose)
            await catalog.attach(
                engine,
                count_upload=self._metrics.count_upload,
                count_damaged=self._metrics.count_damaged,
                charge_probe=partial(charge_probe, self._metrics, usage),
            )
            self._metrics.show_orphans(catalog.num_orphans)
            if settings.adapters is not None:
                await catalog.register_folder(settings.adapters)
            await warm_up(engine, [each.ref for each in catalog.directory.visible_to(PUBLIC_TENANT)])
            # The model, its libraries and what else lives as long as the process need no looking at ever again.
            gc.collect()
            gc.freeze()
            await self._answer(catalog, engine, gate, usage, inspector)

    async def _answer(
        self, catalog: Catalog, engine: "AsyncEngine", gate: TenantGate, usage: UsageLedger, inspector: Inspect
    ) -> None:
        settings = self._settings
        departure = Departure()
        app = create_app(
            settings,
            engine,
            catalog.directory,
            gate,
            self._metrics,
            extra_routers=(
                adapters.build_router(catalog),
                inspection.build_router(catalog, inspector),
                usage_routes.build_router(usage),
                dashboard_routes.build_router(settings.root_path),
            ),
            usage=usage,
            tracing=self._tracing,
            may_run_open=settings.allow_open or is_loopback(self._host),
            departure=departure,
        )
        server = DrainingServer(
            make_config(app, Connections(Limits.of(settings), self._metrics.count_connection_ended)),
            drain=partial(self._drain, engine, departure),
            on_started=lambda: self._announce(self._announcement(catalog, engine, gate)),
        )
        if settings.exit_on_engine_failure:
            engine.on_death(server.begin_draining)
        try:
            await server.serve(sockets=[self._sock])
        except OSError as error:
            raise StartupError(f"{self._host}:{settings.port} cannot be listened on: {error.strerror}.") from error
        if settings.exit_on_engine_failure and engine.failure is not None:
            raise engine.failure

    async def _drain(self, engine: "AsyncEngine", departure: Departure) -> None:
        """First nobody is sent here any more, then nobody is taken any more."""
        departure.is_near = True
        if engine.failure is None:  # or there is nothing left to be answered meanwhile
            await asyncio.sleep(self._settings.drain_delay_s)
        await engine.drain(self._settings.drain_timeout_s)

    def _announcement(self, catalog: Catalog, engine: "AsyncEngine", gate: TenantGate) -> Announcement:
        return Announcement(
            url=url_of(self._host, self._sock.getsockname()[1]),
            model=engine.model.name,
            num_adapters=catalog.directory.num_usable,
            num_other_base=len(catalog.directory) - catalog.directory.num_usable,
            is_open=gate.is_open,
            has_metrics=self._metrics.is_on,
            moved_from=self._settings.host if self._host != self._settings.host else None,
        )


async def charge_probe(metrics: Metrics, usage: UsageSink, tenant: str, adapter: AdapterRef, num_tokens: int) -> None:
    """What an upload has run is on the tenant's bill; returns once it is kept for good."""
    metrics.count_probe(tenant, adapter.name, num_tokens)
    usage.add_probe(tenant, adapter, num_tokens)
    await usage.stored()


def url_of(host: str, port: int) -> str:
    """An address that a browser on this machine can open."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return f"http://{host}:{port}"
    if address.is_unspecified:
        return f"http://{_LOOPBACK}:{port}"
    return f"http://[{host}]:{port}" if address.version == 6 else f"http://{host}:{port}"
