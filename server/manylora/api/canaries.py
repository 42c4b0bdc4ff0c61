"""An adapter's canary: a version that answers a share of the requests for the bare name, and what came of it."""

import time
from typing import Annotated, Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from manylora.api.adapters import Note, TenantQuery, VersionNumber, as_asked, owner_for, revised_by
from manylora.api.auth import Caller, Manager, author_of
from manylora.api.bodies import Body, read_body
from manylora.api.json_body import documented
from manylora.api.ownership import answers_for
from manylora.catalog.canaries import Arm, CanaryRecord
from manylora.catalog.service import Catalog
from manylora.database.tables import MICROSECONDS
from manylora.errors import InvalidRequest, PermissionDenied

__all__ = ["CanaryBody", "build_router"]

MAX_CANARY_UNTIL: Final = 253_402_300_799  # Unix seconds: the year 9999


class CanaryBody(Body):
    """`PUT /v1/adapters/{name}/canary`. `until` is in Unix seconds; left out, it runs until somebody ends it."""

    version: VersionNumber
    share: Annotated[float, Field(gt=0, le=1)]
    until: Annotated[int, Field(ge=1, le=MAX_CANARY_UNTIL)] | None = None
    note: Note | None = None


def build_router(catalog: Catalog) -> APIRouter:
    """The routes over one catalog. Needs `app.state.services` for authentication (see `api.auth`)."""
    router = APIRouter(tags=["adapters"], route_class=revised_by(catalog))

    @router.put("/v1/adapters/{name}/canary", openapi_extra=documented("CanaryBody"))
    async def begin_canary(request: Request, name: str, caller: Manager, tenant: TenantQuery = None) -> Response:
        """Let a version answer a share of the requests for the bare name, always the same users'.

        It ends when it is stopped, when another version becomes active or it is deleted, at `until`, and by itself when
        it fails more often than the active version. The same version again changes share and end.
        """
        body = await read_body(request, CanaryBody)
        if body.until is not None and body.until <= time.time():
            raise InvalidRequest("'until' is over already. Send a later time in Unix seconds, or none.", param="until")
        until = None if body.until is None else body.until * MICROSECONDS
        owner = await owner_for(catalog, caller, name, tenant, for_change=True)
        record = await catalog.canaries.begin(
            owner, name, body.version, share=body.share, until=until, author=author_of(caller, body.note)
        )
        return JSONResponse(_view(record))

    @router.get("/v1/adapters/{name}/canary")
    async def get_canary(name: str, caller: Caller, tenant: TenantQuery = None) -> Response:
        """The canary that runs, or else the last one, with what came of either version's requests."""
        with as_asked(name):
            owner = await owner_for(catalog, caller, name, tenant)
            if not answers_for(caller, owner):
                raise PermissionDenied(f"'{name}' belongs to everybody: its canary is for keys with the role 'admin'.")
            return JSONResponse(_view(await catalog.canaries.last(owner, name)))

    @router.delete("/v1/adapters/{name}/canary")
    async def stop_canary(name: str, caller: Manager, tenant: TenantQuery = None) -> Response:
        """End the one that runs: the active version answers everybody again."""
        owner = await owner_for(catalog, caller, name, tenant, for_change=True)
        return JSONResponse(_view(await catalog.canaries.stop(owner, name, author=author_of(caller))))

    return router


def _view(record: CanaryRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "object": "adapter.canary",
        "name": record.name,
        "tenant": record.tenant,
        "version": record.tried.version,
        "active_version": record.beside.version,
        "share": record.share,
        "until": _seconds(record.until),
        "created": _seconds(record.created),
        "ended": _seconds(record.ended),
        "reason": record.reason or None,
        "p_value": record.p_value,
        "versions": [_arm(record.tried), _arm(record.beside)],
    }


def _arm(arm: Arm) -> dict[str, Any]:
    return {
        "version": arm.version,
        "requests": arm.requests,
        "outcomes": arm.outcomes,
        "prompt_tokens": arm.prompt_tokens,
        "completion_tokens": arm.completion_tokens,
        "cached_tokens": arm.cached_tokens,
        "mean_ttft_s": arm.mean_ttft_s,
    }


def _seconds(microseconds: int | None) -> int | None:
    return None if microseconds is None else microseconds // MICROSECONDS
