"""What was changed, by whom and when: an adapter's history, the way back, and for admins the log of all changes."""

from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from manylora.api.adapters import (
    Note,
    TenantQuery,
    VersionNumber,
    adapter_view,
    as_asked,
    owner_for,
    revised_by,
)
from manylora.api.auth import Admin, Caller, Manager, author_of, has_role
from manylora.api.bodies import Body, read_body
from manylora.api.json_body import documented
from manylora.api.ownership import answers_for
from manylora.catalog.records import Change, ChangePage
from manylora.catalog.service import Catalog
from manylora.errors import PermissionDenied
from manylora.tenants.interface import Principal, Role

__all__ = ["build_router"]

MAX_CHANGES: Final = 1000
_Limit = Annotated[int, Query(ge=1, le=MAX_CHANGES)]
_Before = Annotated[int | None, Query(ge=1, lt=2**63, description="The `next_before` of the page before.")]


class RollbackBody(Body):
    """`POST /v1/adapters/{name}/rollback`; `{}` is enough."""

    if_active: VersionNumber | None = None
    note: Note | None = None


def build_router(catalog: Catalog) -> APIRouter:
    """The routes over one catalog. Needs `app.state.services` for authentication (see `api.auth`)."""
    router = APIRouter(tags=["adapters"], route_class=revised_by(catalog))

    @router.get("/v1/adapters/{name}/history")
    async def adapter_history(
        name: str, caller: Caller, limit: _Limit = 50, before: _Before = None, tenant: TenantQuery = None
    ) -> Response:
        """Who changed the adapter, when, and which version was active before and after; newest first."""
        with as_asked(name):
            owner = await owner_for(catalog, caller, name, tenant)
            if not answers_for(caller, owner):
                raise PermissionDenied(f"'{name}' belongs to everybody: its history is for keys with the role 'admin'.")
            page = await catalog.history(owner, name, limit, before)
        return _answer(page, caller)

    @router.post("/v1/adapters/{name}/rollback", openapi_extra=documented("RollbackBody"))
    async def roll_back(request: Request, name: str, caller: Manager, tenant: TenantQuery = None) -> Response:
        """Make the version active again that was before the present one; once more goes back one further.

        With `if_active`, only while that version is the active one. Running requests keep what they began with.
        """
        body = await read_body(request, RollbackBody)
        owner = await owner_for(catalog, caller, name, tenant, for_change=True)
        author = author_of(caller, body.note)
        record = await catalog.rollback(owner, name, if_active=body.if_active, author=author)
        return JSONResponse(adapter_view(catalog, record, caller))

    @router.get("/v1/audit")
    async def audit(
        caller: Admin,
        limit: _Limit = 50,
        before: _Before = None,
        tenant: Annotated[str | None, Query(description="Only what was changed of this tenant's.")] = None,
    ) -> Response:
        """What was changed of all tenants', by whom and when, newest first; what is deleted by now included."""
        return _answer(await catalog.changes(tenant, limit, before), caller)

    return router


def _answer(page: ChangePage, caller: Principal) -> Response:
    data = [_view(change, caller) for change in page.changes]
    return JSONResponse({"object": "list", "data": data, "next_before": page.next_before})


def _view(change: Change, caller: Principal) -> dict[str, Any]:
    author = change.author
    # A tenant hears of its own keys; of an operator of another tenant it hears the role.
    is_told = has_role(caller, Role.ADMIN) or author.tenant == caller.tenant
    return {
        "id": change.id,
        "object": "change",
        "at": change.at_s,
        "kind": change.kind,
        "tenant": change.tenant,
        "name": change.name,
        "action": change.action,
        "version": change.version,
        "from_version": change.from_version,
        "to_version": change.to_version,
        "fields": list(change.fields),
        "by": {
            "role": author.role,
            "tenant": author.tenant if is_told else None,
            "key_id": author.key_id if is_told else None,
        },
        "note": author.note,
    }
