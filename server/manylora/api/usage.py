"""`GET /v1/usage`: what was used and stored, for the bill."""

import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Final

import orjson
from fastapi import APIRouter, Query
from fastapi.responses import Response

from manylora.api.auth import Caller, has_role
from manylora.tenants.interface import Role
from manylora.usage.ledger import UsageLedger
from manylora.usage.period import parse_period
from manylora.usage.prices import Prices
from manylora.usage.report import UsageReport, make_report, parse_groups

__all__ = ["build_router"]

MAX_ROWS: Final = 10_000

_Moment = Annotated[str | None, Query(description="2026-11-24 (midnight UTC) or RFC 3339, on a quarter of an hour.")]
_Groups = Annotated[str | None, Query(description="Comma list of tenant, adapter, and day or hour.")]


def build_router(usage: UsageLedger, prices: Prices | None = None) -> APIRouter:
    """The route over this ledger. With `prices` it says what was used in money, too."""
    router = APIRouter(tags=["operations"])

    @router.get("/v1/usage")
    async def get_usage(
        caller: Caller,
        start: Annotated[_Moment, Query(alias="from")] = None,
        to: _Moment = None,
        group_by: _Groups = None,
        limit: Annotated[int, Query(ge=1, le=MAX_ROWS)] = MAX_ROWS,
        after: Annotated[str | None, Query(description="The last_id of the page before.")] = None,
    ) -> Response:
        """Usage of the caller's tenant, for admins of all: up to date, what has just ended included.

        A page of rows, and the total of all of them.
        """
        period, groups = parse_period(start, to), parse_groups(group_by)
        await usage.flush()
        tenant = None if has_role(caller, Role.ADMIN) else caller.tenant
        report = partial(make_report, usage.database, period, groups, tenant=tenant, limit=limit, after=after)
        body = await usage.database.run(partial(_render, report, prices))
        return Response(body, media_type="application/json", headers={"cache-control": "no-store"})

    return router


def _render(report: Callable[..., UsageReport], prices: Prices | None) -> bytes:
    return orjson.dumps(report(now_us=time.time_ns() // 1000).as_dict(prices))
