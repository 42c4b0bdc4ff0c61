"""The HTTP application over parts that exist. `serving.serve` makes the parts and runs it."""

from collections.abc import Callable, Sequence

from fastapi import APIRouter, Depends, FastAPI
from fastapi.routing import APIRoute
from starlette.types import Scope

from manylora import __version__
from manylora.api import (
    anthropic,
    audio,
    classify,
    embeddings,
    ollama,
    openai,
    ops,
    questions,
    rerank,
    responses,
    sagemaker,
    tgi,
    tokens,
)
from manylora.api.docs import install_docs
from manylora.api.errors import install_error_handlers
from manylora.api.middleware import (
    AnyMethodAndEncoding,
    BodyLimit,
    CanonicalPath,
    LastResort,
    OpenGuard,
    RequestContext,
)
from manylora.api.origins import Cors, OpenRules, OwnHosts
from manylora.api.query import check_query
from manylora.api.record import Recorder
from manylora.api.router_metrics import RouterMetrics
from manylora.api.state import Departure, Services
from manylora.api.tracing import NO_TRACING, Tracing
from manylora.api.traffic import Traffic
from manylora.catalog.interface import AdapterDirectory, Following
from manylora.engine.interface import EngineClient
from manylora.errors import InvalidSettings
from manylora.metrics import Metrics
from manylora.serving.http_server import is_loopback
from manylora.settings import Settings
from manylora.tenants.interface import Gate
from manylora.tenants.presence import Presence
from manylora.usage.interface import UsageSink

__all__ = ["create_app", "inference_routes", "upload_limits"]

# Bodies that are written to disk as they come, each with the setting that bounds it.
_UPLOADS = {("POST", "/v1/adapters"): "max_adapter_size", ("POST", "/v1/files"): "max_file_size"}
_MULTIPART_OVERHEAD = 2**20  # form fields, part headers and the adapter's configuration
_INFERENCE = (
    *(openai, responses, anthropic, embeddings, classify, rerank, questions, audio),
    *(tokens, tgi, ollama, sagemaker),
)


def create_app(
    settings: Settings,
    engine: EngineClient,
    directory: AdapterDirectory,
    gate: Gate,
    metrics: Metrics,
    *,
    extra_routers: Sequence[APIRouter] = (),
    recorders: Sequence[Recorder] = (),
    usage: UsageSink | None = None,
    tracing: Tracing | None = None,
    may_run_open: bool = True,
    departure: Departure | None = None,
    following: Following | None = None,
) -> FastAPI:
    """The HTTP application. `recorders` hear of every finished inference request, `usage` counts them for good.

    `following` knows what other servers change; None where there are none.
    """
    app = FastAPI(
        title="manylora",
        version=__version__,
        description="One base model, many LoRA adapters, every forward pass shared. OpenAI-compatible.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        dependencies=[Depends(check_query)],
        telemetry=NO_TRACING if tracing is None else tracing.telemetry,
    )
    body_limit = _in_bytes(settings.max_body, "max_body")
    presence = Presence(
        max_requests=settings.max_tenant_requests or max(1, settings.max_connections // 2),
        max_bytes=max(_in_bytes(settings.max_body_memory, "max_body_memory"), 2 * body_limit),
    )
    app.state.services = Services(
        settings=settings,
        engine=engine,
        directory=directory,
        gate=gate,
        metrics=metrics,
        traffic=Traffic(),
        presence=presence,
        router_metrics=RouterMetrics(engine, directory, following, settings.block_size),
        recorders=(*recorders, *(() if tracing is None else (tracing.record,))),
        usage=usage,
        may_run_open=may_run_open,
        departure=departure or Departure(),
        following=following,
    )
    routers = (ops.router, *(each.router for each in _INFERENCE), *extra_routers)
    for router in routers:
        app.include_router(router)
    install_docs(app, routers)
    install_error_handlers(app)
    _add_layers(app, settings, body_limit, app.state.services, is_open=lambda: gate.is_open and may_run_open)
    metrics.watch_engine(engine.stats, lambda: engine.is_ready)
    _prepare_routes(app)
    return app


def upload_limits(settings: Settings) -> dict[tuple[str, str], int]:
    """By method and path, how many bytes a body may have that goes to disk as it comes; of all others, `max_body`."""
    body_limit = _in_bytes(settings.max_body, "max_body")
    return {
        route: max(body_limit, _in_bytes(getattr(settings, name), name) + _MULTIPART_OVERHEAD)
        for route, name in _UPLOADS.items()
    }


def inference_routes() -> set[tuple[str, str]]:
    """The method and path of every request that only asks the model something, and so may be sent again."""
    found: set[tuple[str, str]] = set()
    for each in _INFERENCE:
        for route in each.router.routes:
            if isinstance(route, APIRoute):
                found |= {(method, route.path) for method in route.methods or ()}
    return found


def _add_layers(
    app: FastAPI, settings: Settings, body_limit: int, services: Services, *, is_open: Callable[[], bool]
) -> None:
    """What every request passes on its way to a route; the last one added comes first."""
    uploads = upload_limits(settings)

    def is_upload(scope: Scope) -> bool:
        return (scope["method"], scope["path"]) in uploads

    def limit_of(scope: Scope) -> int:
        return uploads.get((scope["method"], scope["path"]), body_limit)

    is_reachable = settings.allow_open and not is_loopback(settings.host)
    app.add_middleware(BodyLimit, limit_of=limit_of, is_streamed=is_upload, presence=services.presence)
    app.add_middleware(AnyMethodAndEncoding)
    hosts = OwnHosts((settings.host, *settings.allowed_hosts), is_reachable=is_reachable)
    app.add_middleware(OpenGuard, is_open=is_open, rules=OpenRules(hosts, settings.allowed_origins))
    app.add_middleware(LastResort)
    if settings.allowed_origins:
        app.add_middleware(Cors, allow_origins=settings.allowed_origins)
    app.add_middleware(RequestContext, count=services.metrics.count_answer)
    app.add_middleware(CanonicalPath, root_path=settings.root_path)


def _prepare_routes(app: FastAPI) -> None:
    """Let FastAPI build its routes now: it does so when they are first compared with a path, and takes milliseconds."""
    scope = {"type": "http", "method": "GET", "path": "/", "root_path": "", "headers": []}
    for route in app.router.routes:
        route.matches(scope)


def _in_bytes(size: int | float, name: str) -> int:
    if isinstance(size, float):
        raise InvalidSettings(f"{name} is a size in bytes, such as '16MiB', not a share of memory.")
    return size
