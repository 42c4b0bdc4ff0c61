"""A server without a socket: base, catalog, engine, keys and usage put together, for whoever answers requests.

The HTTP server (`serving.process`), a program that generates in its own process, and tests open the same parts.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from fastapi import FastAPI

from manylora.api import (
    adapters,
    canaries,
    dashboard_routes,
    data_files,
    defaults,
    fine_tuning,
    history,
    inspection,
    tenants,
)
from manylora.api import usage as usage_routes
from manylora.api.inspection import Inspect
from manylora.api.record import Recorder
from manylora.api.state import Departure
from manylora.api.tracing import Tracing, open_tracing
from manylora.catalog.interface import AdapterDirectory
from manylora.catalog.service import Catalog
from manylora.catalog.store import check_reachable
from manylora.database.notices import Notices
from manylora.engine.interface import AdapterSource, EngineClient
from manylora.errors import EngineDead, InvalidSettings
from manylora.identity import AdapterRef
from manylora.jobs.board import Board
from manylora.jobs.files import DataFiles
from manylora.jobs.judge import Judge
from manylora.jobs.publisher import Publisher
from manylora.jobs.queue import JobQueue
from manylora.jobs.worker_process import Assignment, check_packages
from manylora.lora.format.spec import BaseWeights, ModuleSpec
from manylora.lora.memory.occupancy import Occupancy
from manylora.metrics import Metrics, NoMetrics
from manylora.serving.app import create_app
from manylora.serving.imports import uncollected
from manylora.serving.job_worker import JobWorker
from manylora.settings import Settings
from manylora.tenants.gate import TenantGate
from manylora.tenants.seal import Seal
from manylora.usage.interface import UsageSink
from manylora.usage.ledger import UsageLedger
from manylora.usage.prices import Prices

__all__ = ["Foundation", "Parts", "ServingEngine", "load_foundation", "open_parts"]


class ServingEngine(EngineClient, Protocol):
    """An engine with a beginning, and with an end that is heard of."""

    async def start(self) -> None:
        """On the event loop, before anything else."""
        ...

    @property
    def failure(self) -> EngineDead | None:
        """Why it has ended for good, or None."""
        ...

    def on_death(self, action: Callable[[], None]) -> None:
        """Call `action` on the event loop once the engine has ended for good."""
        ...


@dataclass(frozen=True, slots=True)
class Foundation:
    """A base in memory as the other parts see it, and how the engine over it is built.

    `modules` are what an adapter may touch; `weights`, the base's own numbers for adapters that bring copies of them;
    `name`, what the base is served as. `build_engine` raises StartupError.
    """

    modules: Mapping[str, ModuleSpec]
    inspect: Inspect
    build_engine: Callable[[AdapterSource, Metrics, Occupancy], ServingEngine]
    weights: BaseWeights | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Parts:
    """What answers requests, running. Used on the event loop on which it was opened."""

    settings: Settings
    catalog: Catalog
    engine: ServingEngine
    gate: TenantGate
    usage: UsageLedger
    metrics: Metrics
    tracing: Tracing | None
    inspect: Inspect
    files: DataFiles

    @property
    def directory(self) -> AdapterDirectory:
        """From an adapter's name to the identity that `engine.generate` takes."""
        return self.catalog.directory

    def app(
        self, *, may_run_open: bool = True, departure: Departure | None = None, recorders: Sequence[Recorder] = ()
    ) -> FastAPI:
        """The HTTP application over these parts, for any ASGI server; see `create_app`."""
        prices = _prices(self.settings)
        return create_app(
            self.settings,
            self.engine,
            self.directory,
            self.gate,
            self.metrics,
            extra_routers=(
                adapters.build_router(self.catalog),
                history.build_router(self.catalog),
                canaries.build_router(self.catalog),
                inspection.build_router(self.catalog, self.inspect),
                tenants.build_router(self.gate),
                usage_routes.build_router(self.usage, prices),
                data_files.build_router(self.files),
                fine_tuning.build_router(self.catalog, Board(self.catalog.database), prices),
                dashboard_routes.build_router(self.settings.root_path),
            ),
            recorders=recorders,
            usage=self.usage,
            tracing=self.tracing,
            may_run_open=may_run_open,
            departure=departure,
            following=self.catalog.following,
        )


@asynccontextmanager
async def open_parts(
    settings: Settings, load: Callable[[Settings], Foundation] | None = None, *, address: str | None = None
) -> AsyncIterator[Parts]:
    """Start every part and, at the end, end them in the opposite order.

    `load` brings the base, `load_foundation` where nothing else is said. What can fail does so in the order in which it
    is cheap: the model's folder, data folder and database, then memory. Raises StartupError.

    `address` is where requests will be answered, and where versions are judged that jobs made; without one, another
    server of the database judges them.
    """
    metrics = Metrics() if settings.metrics else NoMetrics()
    tracing = open_tracing(settings)
    check_reachable(settings.resolved_store_url)
    if settings.jobs:
        check_packages()
    foundation = (load or load_foundation)(settings)
    async with AsyncExitStack() as stack:
        if tracing is not None:
            stack.push_async_callback(asyncio.to_thread, tracing.close)
        catalog = Catalog.open(settings, foundation.modules, foundation.weights, base_name=foundation.name)
        stack.push_async_callback(catalog.aclose)
        gate = TenantGate(
            catalog.database,
            Seal(settings.data_dir, catalog.store),
            replicas=catalog.replicas,
            count_fallback=metrics.count_quota_fallback,
        )
        occupancy = Occupancy()
        usage = UsageLedger(catalog.database, occupancy, settings.data_dir / "usage", wait_s=settings.usage_wait_s)
        usage.start()
        stack.push_async_callback(usage.aclose)
        engine = foundation.build_engine(catalog, metrics, occupancy)
        await engine.start()
        stack.push_async_callback(engine.close)
        notices = Notices(catalog.database)
        notices.start()
        stack.push_async_callback(notices.aclose)
        gate.start(notices)
        stack.push_async_callback(gate.aclose)
        await catalog.attach(
            engine,
            count_upload=metrics.count_upload,
            count_damaged=metrics.count_damaged,
            charge_probe=partial(_charge_probe, metrics, usage),
            check_defaults=partial(defaults.check, engine),
            notices=notices,
        )
        metrics.show_orphans(catalog.num_orphans)
        if settings.adapters is not None:
            await catalog.register_folder(settings.adapters)
        files = await _open_jobs(settings, catalog, metrics, stack)
        if address is not None:
            scratch = settings.data_dir / "judged"
            judge = Judge(catalog, gate, files, scratch, address=address, model=settings.model)
            judge.start()
            stack.push_async_callback(judge.aclose)
        yield Parts(settings, catalog, engine, gate, usage, metrics, tracing, foundation.inspect, files)


async def _open_jobs(settings: Settings, catalog: Catalog, metrics: Metrics, stack: AsyncExitStack) -> DataFiles:
    """What becomes of tenants' data: files, publication of what was trained and, if asked for, a worker."""
    if isinstance(settings.max_file_size, float):
        raise InvalidSettings("max_file_size is a size in bytes, such as '1GiB', not a share of memory.")
    files = DataFiles(
        catalog.database,
        catalog.store,
        settings.data_dir / "received",
        max_bytes=settings.max_file_size,
        kept_days=settings.file_days,
    )
    stack.push_async_callback(files.aclose)
    queue = JobQueue(catalog.database)
    publisher = Publisher(catalog, queue, files, metrics, kept_days=settings.job_days)
    publisher.start()
    stack.push_async_callback(publisher.aclose)
    if settings.jobs:
        worker = JobWorker(Assignment.of(settings, seats=settings.jobs, base=catalog.base))
        worker.start()
        stack.push_async_callback(worker.aclose)
    return files


def _prices(settings: Settings) -> Prices | None:
    return Prices.of(
        settings.price_currency,
        prompt=settings.price_prompt,
        cached=settings.price_cached,
        completion=settings.price_completion,
        training=settings.price_training,
    )


async def _charge_probe(metrics: Metrics, usage: UsageSink, tenant: str, adapter: AdapterRef, num_tokens: int) -> None:
    """What an upload has run is on the tenant's bill; returns once it is kept for good."""
    metrics.count_probe(tenant, adapter.name, num_tokens)
    usage.add_probe(tenant, adapter, num_tokens)
    await usage.stored()


def load_foundation(settings: Settings) -> Foundation:
    """The base that the settings name, with the engine that the settings describe. Raises StartupError."""
    with uncollected():  # not before it is needed: torch takes seconds to import
        from manylora.engine.build import EngineBuilder
        from manylora.engine.image_build import ImageBuilder
        from manylora.engine.pool_build import PoolBuilder
        from manylora.engine.speech_build import SpeechBuilder
        from manylora.lifecycle.weights.served import Inspector
        from manylora.models.encoder_loading import is_encoder, load_encoder
        from manylora.models.image_loading import is_image_model, load_image_model
        from manylora.models.loading import load_base, resolve_model
        from manylora.models.speech_loading import is_speech, load_speech
        from manylora.models.stored_weights import StoredWeights
    folder = resolve_model(settings.model)
    builder: EngineBuilder | PoolBuilder | SpeechBuilder | ImageBuilder
    if is_encoder(folder):
        builder = PoolBuilder(settings, load_encoder(settings, folder))
    elif is_speech(folder):
        builder = SpeechBuilder(settings, load_speech(settings, folder))
    elif is_image_model(folder):
        builder = ImageBuilder(settings, load_image_model(settings, folder))
    else:
        builder = EngineBuilder(settings, load_base(settings))
    base = builder.base
    return Foundation(
        modules=builder.modules,
        inspect=Inspector(base.folder, builder.modules),
        build_engine=builder.build,
        weights=StoredWeights(base.folder, builder.modules),
        name=base.name,
    )
