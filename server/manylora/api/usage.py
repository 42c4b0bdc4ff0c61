"""`GET /v1/usage`: what was used and stored, for the bill."""

import time
from functools import partial
from typing import Annotated

import orjson
from fastapi import APIRouter, Query
from fastapi.responses import Response

from manylora.api.auth import Caller, has_role
from manylora.tenants.interface import Role
from manylora.usage.ledger import UsageLedger
from manylora.usage.period import Period, parse_period
from manylora.usage.report import Group, make_report, parse_groups

__all__ = ["build_router"]

_Moment = Annotated[str | None, Query(description="2026-11-24 (midnight UTC) or RFC 3339, on a quarter of an hour.")]
_Groups = Annotated[str | None, Query(description="Comma list of tenant, adapter, day.")]


def build_router(usage: UsageLedger) -> APIRouter:
    """The route over this ledger."""
    router = APIRouter(tags=["operations"])

    @router.get("/v1/usage")
    async def get_usage(
        caller: Caller,
        start: Annotated[_Moment, Query(alias="from")] = None,
        to: _Moment = None,
        group_by: _Groups = None,
    ) -> Response:
        """Usage of the caller's tenant, for admins of all: up to date, what has just ended included."""
        period, groups = parse_period(start, to), parse_groups(group_by)
        await usage.flush()
        tenant = None if has_role(caller, Role.ADMIN) else caller.tenant
        body = await usage.database.run(partial(_render, usage, period, groups, tenant))
        return Response(body, media_type="application/json", headers={"cache-control": "no-store"})

    return router


def _render(usage: UsageLedger, period: Period, groups: tuple[Group, ...], tenant: str | None) -> bytes:
    report = make_report(usage.database, period, groups, tenant=tenant, now_us=time.time_ns() // 1000)
    return orjson.dumps(report.as_dict())
