"""`/v1/tenants` and `/v1/keys`: shares, quotas and keys over HTTP, for admins."""

import time
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, ClassVar, Final, TypeVar

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, model_validator

from manylora.api.auth import Admin, author_of
from manylora.api.bodies import Body, read_body
from manylora.api.json_body import documented
from manylora.errors import InvalidRequest
from manylora.tenants.gate import TenantGate
from manylora.tenants.interface import Role
from manylora.tenants.keys import MAX_KEY_NAME, Key
from manylora.tenants.limits import Tenant

__all__ = ["build_router"]

MAX_PAGE: Final = 1000
_MICROSECONDS: Final = 1_000_000
_LATEST: Final = 2**40  # Unix seconds
_Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]
_Quota = Annotated[int, Field(ge=0, lt=2**62)]
T = TypeVar("T")


class TenantBody(Body):
    """`PATCH /v1/tenants/{tenant}`: what is given is set, null lifts a limit, the rest stays."""

    null_is_a_value: ClassVar[bool] = True

    weight: float | None = None
    requests_per_minute: _Quota | None = None
    tokens_per_minute: _Quota | None = None
    max_concurrent: _Quota | None = None
    max_adapters: _Quota | None = None
    max_adapter_bytes: _Quota | None = None
    max_pinned: _Quota | None = None
    max_file_bytes: _Quota | None = None
    max_jobs_queued: _Quota | None = None
    max_jobs_running: _Quota | None = None
    training_tokens_per_day: _Quota | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "TenantBody":
        if not self.model_fields_set:
            raise ValueError(f"Send at least one of {', '.join(type(self).model_fields)}.")
        return self


class KeyBody(Body):
    """`POST /v1/keys`. `expires`: Unix seconds."""

    tenant: str
    role: Role = Field(Role.USER, strict=False)
    name: Annotated[str, Field(max_length=MAX_KEY_NAME)] = ""
    expires: Annotated[int, Field(ge=0, lt=_LATEST)] | None = None


def build_router(gate: TenantGate) -> APIRouter:
    """The routes over the gate, which knows of a change when it is answered for."""
    router = APIRouter(tags=["tenants and keys"])
    _add_tenants(router, gate)
    _add_keys(router, gate)
    return router


def _add_tenants(router: APIRouter, gate: TenantGate) -> None:
    @router.get("/v1/tenants")
    async def list_tenants(_caller: Admin, limit: _Limit = 50, after: str = "") -> Response:
        """The tenants by name: those with a share or quotas of their own, with keys, or with adapters."""
        tenants, has_more = await gate.run(partial(gate.tenant_store.page, limit, after))
        last = tenants[-1].name if tenants else None
        data = [_tenant_view(tenant) for tenant in tenants]
        return _private({"object": "list", "data": data, "last_id": last, "has_more": has_more})

    @router.get("/v1/tenants/{tenant}")
    async def get_tenant(tenant: str, _caller: Admin) -> Response:
        """One tenant: its share, its quotas, and what it keeps now."""
        return _private(_tenant_view(await gate.run(partial(gate.tenant_store.get, tenant))))

    @router.patch("/v1/tenants/{tenant}", openapi_extra=documented("TenantBody"))
    async def change_tenant(request: Request, tenant: str, caller: Admin) -> Response:
        """Set a tenant's share and quotas; null lifts a limit. A tenant that nobody knew yet may be prepared."""
        body = await read_body(request, TenantBody)
        values = {name: getattr(body, name) for name in body.model_fields_set}
        if "weight" in values and values["weight"] is None:
            raise InvalidRequest("'weight' is a number; 1 is the default.", param="weight")
        await gate.change(partial(gate.tenant_store.change, tenant, author_of(caller), **values))
        return _private(_tenant_view(await gate.run(partial(gate.tenant_store.get, tenant))))


def _add_keys(router: APIRouter, gate: TenantGate) -> None:
    @router.get("/v1/keys")
    async def list_keys(
        _caller: Admin,
        limit: _Limit = 50,
        after: str | None = None,
        tenant: Annotated[str | None, Query(description="Only this tenant's.")] = None,
    ) -> Response:
        """The keys, newest first, without their secrets; revoked and expired ones too."""
        keys, has_more = await gate.run(partial(gate.key_store.page, tenant, limit, after))
        last = keys[-1].id if keys else None
        data = [_key_view(key) for key in keys]
        return _private({"object": "list", "data": data, "last_id": last, "has_more": has_more})

    @router.post("/v1/keys", status_code=201, openapi_extra=documented("KeyBody"))
    async def create_key(request: Request, caller: Admin) -> Response:
        """Make a key. `key` in the answer is its text, which is never shown again: only its hash is kept."""
        body = await read_body(request, KeyBody)
        expires = None if body.expires is None else body.expires * _MICROSECONDS
        if expires is not None and expires <= time.time_ns() // 1000:
            raise InvalidRequest("'expires' is over already; it is a Unix time in seconds.", param="expires")
        create = partial(
            gate.key_store.create, body.tenant, body.role, name=body.name, expires=expires,
            author=author_of(caller), must_keep_admin=True,
        )  # fmt: skip
        key, text = await gate.change(create)
        return _private({**_key_view(key), "key": text}, status=201)

    @router.get("/v1/keys/{key_id}")
    async def get_key(key_id: str, _caller: Admin) -> Response:
        """One key, without its secret."""
        return _private(_key_view(await gate.run(partial(gate.key_store.get, key_id))))

    @router.delete("/v1/keys/{key_id}")
    async def revoke_key(key_id: str, caller: Admin) -> Response:
        """Make a key worthless from now on, here at once and on other servers of the database within a second.

        It stays in the list as a revoked one. Revoking again changes nothing.
        """
        await gate.run(partial(gate.key_store.get, key_id))  # by its id alone, not by its text
        return _private(_key_view(await gate.change(partial(gate.key_store.revoke, key_id, author=author_of(caller)))))


def _private(body: dict[str, Any], *, status: int = 200) -> Response:
    return JSONResponse(body, status, headers={"cache-control": "no-store"})


def _tenant_view(tenant: Tenant) -> dict[str, Any]:
    kept = {"adapters": tenant.adapters, "pinned": tenant.pinned, "adapter_bytes": tenant.adapter_bytes}
    return {"object": "tenant", "name": tenant.name, **asdict(tenant.limits), "kept": kept, "num_keys": tenant.keys}


def _key_view(key: Key) -> dict[str, Any]:
    is_over = key.is_over(time.time_ns() // 1000)
    return {
        "id": key.id,
        "object": "key",
        "tenant": key.tenant,
        "role": key.role.value,
        "name": key.name,
        "prefix": f"ml_{key.prefix}",
        "status": "revoked" if key.revoked is not None else "expired" if is_over else "valid",
        **{when: _seconds(getattr(key, when)) for when in ("created", "last_used", "expires", "revoked")},
    }


def _seconds(microseconds: int | None) -> int | None:
    return None if microseconds is None else microseconds // _MICROSECONDS
