"""`/health`, `/ready`, `/version`, `/metrics`, `/metrics/router`, `/v1/logs/{request_id}` and `/v1/stats`."""

import platform
from dataclasses import asdict
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.responses import JSONResponse, Response

from manylora import __version__
from manylora.api.auth import Admin, Caller, current_principal, has_role
from manylora.api.state import Services, ServicesDep
from manylora.errors import Draining, NotFound, PermissionDenied, Unavailable
from manylora.log import NUM_REMEMBERED_LINES, RECENT
from manylora.tenants.interface import Role

__all__ = ["router"]

router = APIRouter(tags=["operations"])


@router.get("/health")
async def health() -> dict[str, str]:
    """The process is alive."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(services: ServicesDep) -> dict[str, str]:
    """The model is loaded and the engine steps; 503 otherwise."""
    if services.departure.is_near or services.engine.is_draining:
        raise Draining("The server is shutting down.")
    if not services.engine.is_ready:
        raise Unavailable("The engine is not running.")
    return {"status": "ready", "model": services.engine.model.name}


@router.get("/version")
async def version() -> dict[str, str]:
    """What runs here."""
    return {"version": __version__, "python": platform.python_version()}


@router.get("/metrics")
async def metrics(caller: Admin, services: ServicesDep) -> Response:
    """Prometheus text; 404 where metrics are switched off."""
    if not services.metrics.is_on:
        raise NotFound("Metrics are switched off on this server (--no-metrics).")
    text = await anyio.to_thread.run_sync(services.metrics.render)
    return Response(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)


@router.get("/metrics/router", openapi_extra={"security": [{"key": []}, {"x-api-key": []}, {}]})  # {}: as it is set
async def router_metrics(request: Request, services: ServicesDep) -> Response:
    """What a router in front of several servers reads; 404 where that is switched off."""
    mode = services.settings.router_metrics
    if mode == "off":
        raise NotFound("Metrics for routers are switched off on this server (--router-metrics).")
    if mode == "keys" and not has_role(await current_principal(request, services), Role.ADMIN):
        raise PermissionDenied("This names every tenant's adapters: it needs a key with the role 'admin'.")
    return Response(services.router_metrics.render(), media_type=CONTENT_TYPE_PLAIN_0_0_4)


@router.get("/v1/logs/{request_id}")
async def log_lines(_caller: Admin, request_id: str) -> JSONResponse:
    """What this process has logged of one request, oldest first, as far as its newest lines remember it.

    `kept` is how many lines of all requests are remembered.
    """
    body = {"object": "list", "data": RECENT.of(request_id), "kept": NUM_REMEMBERED_LINES}
    return JSONResponse(body, headers={"cache-control": "no-store"})


@router.get("/v1/stats")
async def stats(
    caller: Caller,
    services: ServicesDep,
    timeline: bool = False,
    client_errors: bool = False,
    tenant: Annotated[str | None, Query(description="What this tenant sees; another's: for admin keys.")] = None,
) -> dict[str, Any]:
    """What the dashboard draws: sequences, blocks, slots and traffic of the caller's tenant (of all, for admins).

    `you` is who asks. With `timeline=true` the last five minutes come with it, with `client_errors=true` the newest
    requests that were answered with 4xx for what they said.
    """
    if not has_role(caller, Role.ADMIN):
        if tenant not in (None, caller.tenant):
            raise PermissionDenied("Only a key with the role 'admin' may see another tenant's traffic.")
        tenant = caller.tenant
    return {
        **_engine_counts(services, tenant),
        "server": {
            "version": __version__,
            "model": services.engine.model.name,
            "context_length": services.engine.model.context_length,
            "is_ready": services.engine.is_ready,
            "is_draining": services.departure.is_near or services.engine.is_draining,
        },
        "you": {"tenant": caller.tenant, "role": caller.role, "is_open": services.gate.is_open},
        "tenant": tenant,
        **({"timeline": services.traffic.timeline(tenant)} if timeline else {}),
        **({"client_errors": services.traffic.client_errors(tenant)} if client_errors else {}),
        **services.traffic.view(tenant, services.engine.tier_of),
    }


def _engine_counts(services: Services, tenant: str | None) -> dict[str, Any]:
    """Of all, or of one tenant alone: even bare counts of all would tell how much others send, and how long it is."""
    counts = asdict(services.engine.stats(tenant))
    counts["slots_resident"] = len(counts["resident"])
    if tenant is not None:
        del counts["steps"], counts["snapshots"]
    return counts
