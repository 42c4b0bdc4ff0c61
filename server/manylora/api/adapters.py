"""The adapter routes: upload, import, list, show, download, promote, pin, delete, and vLLM's two."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import IO, Annotated, Any, Final

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import Field, model_validator

from manylora.api.auth import REVISION_HEADER, Admin, Caller, Manager, author_of, has_role
from manylora.api.bodies import Body, read_body
from manylora.api.json_body import documented, is_json
from manylora.api.naming import looked_up, parse_model
from manylora.api.ownership import answers_for, not_found, owner_of, target_tenant, version_number
from manylora.api.saved_mixes import MixBody, saved
from manylora.api.state import ServicesDep
from manylora.catalog.card import examples_of
from manylora.catalog.defaults import shown
from manylora.catalog.records import MAX_DESCRIPTION, MAX_NOTE, AdapterRecord, Payer, Published, VersionRecord, Wish
from manylora.catalog.service import Catalog
from manylora.errors import AdapterNotFound, InvalidRequest, NotFound, PermissionDenied, quoted
from manylora.identity import PUBLIC_TENANT
from manylora.tenants.interface import Principal, Role

__all__ = [
    "Note",
    "TenantQuery",
    "VersionNumber",
    "adapter_view",
    "as_asked",
    "build_router",
    "owner_for",
    "revised_by",
    "version_of",
]

MAX_VERSIONS: Final = 1000
_CHUNK_BYTES: Final = 2**18
# The status of a version made for a base of other shapes than the one that runs; it comes back with that base.
_OTHER_BASE: Final = "other_base"
_MISSING_PART: Final = "missing_part"
TenantQuery = Annotated[str | None, Query(description="Another tenant's adapter: for admin keys.")]
VersionNumber = Annotated[int, Field(ge=1, lt=2**31)]
Note = Annotated[str, Field(max_length=MAX_NOTE)]


_FILE: Final = {"type": "string", "format": "binary"}
_UPLOAD: Final = {
    "requestBody": {
        "required": True,
        "content": {
            **documented("ImportBody")["requestBody"]["content"],
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {
                        "name": {"type": "string"},
                        "description": {"type": "string"},
                        "pinned": {"type": "boolean"},
                        "activate": {"type": "boolean"},
                        "note": {"type": "string"},
                        "files": {"type": "array", "items": _FILE, "description": "The files of a PEFT folder"},
                        "archive": {**_FILE, "description": "Or one .zip, .tar, .tar.gz or .tgz of it"},
                    },
                }
            },
        },
    }
}


class ImportBody(MixBody):
    """`POST /v1/adapters` as JSON: an import, or a mix that is saved."""

    name: str
    source: str | None = None
    description: Annotated[str, Field(max_length=MAX_DESCRIPTION)] | None = None
    pinned: bool | None = None
    activate: bool | None = None
    note: Note | None = None


class PatchBody(Body):
    """`PATCH /v1/adapters/{name}`: at least one of the fields that change something."""

    active_version: VersionNumber | None = None
    pinned: bool | None = None
    description: Annotated[str, Field(max_length=MAX_DESCRIPTION)] | None = None
    defaults: dict[str, Any] | None = None
    if_active: VersionNumber | None = None
    note: Note | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> "PatchBody":
        if self == PatchBody.model_construct(if_active=self.if_active, note=self.note):
            raise ValueError("Send at least one of active_version, pinned, description and defaults.")
        return self


class LoadBody(Body):
    """vLLM's `load_lora_adapter`."""

    lora_name: str
    lora_path: str
    load_inplace: bool | None = None


class UnloadBody(Body):
    """vLLM's `unload_lora_adapter`; its `lora_int_id` may be sent as null only."""

    lora_name: str
    lora_int_id: None = None


def build_router(catalog: Catalog) -> APIRouter:
    """The routes over one catalog. Needs `app.state.services` for authentication (see `api.auth`)."""
    router = APIRouter(tags=["adapters"], route_class=revised_by(catalog))
    _add_uploads(router, catalog)
    _add_reads(router, catalog)
    _add_changes(router, catalog)
    _add_openai(router, catalog)
    _add_vllm(router, catalog)
    return router


def revised_by(catalog: Catalog) -> type[APIRoute]:
    """Routes that say, where they have changed something, of which revision that is (see `api.auth`)."""

    class Revised(APIRoute):
        """One such route."""

        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_and_tell(request: Request) -> Response:
                response = await handle(request)
                if request.method not in ("GET", "HEAD"):
                    response.headers[REVISION_HEADER] = str(catalog.revision)
                return response

            return handle_and_tell

    return Revised


def _add_uploads(router: APIRouter, catalog: Catalog) -> None:
    @router.post("/v1/adapters", status_code=201, openapi_extra=_UPLOAD)
    async def create_adapter(request: Request, caller: Manager, tenant: TenantQuery = None) -> Response:
        """Upload an adapter (multipart), or import one from an allowed source (JSON, admin keys)."""
        owner = target_tenant(caller, tenant)
        if is_json(request):
            body = await read_body(request, ImportBody)
            wish = Wish(owner, body.name, body.description, body.pinned, body.activate, _payer(caller))
            wish = replace(wish, author=author_of(caller, body.note))
            done = await _brought(catalog, caller, wish, body)
        else:
            length = request.headers.get("content-length", "")
            announced = int(length) if length.isascii() and length.isdigit() else None
            kind = request.headers.get("content-type", "")
            done = await catalog.upload(
                owner, _stream(request), kind, announced, payer=_payer(caller), author=author_of(caller)
            )
        return _published(request, catalog, done)


async def _brought(catalog: Catalog, caller: Principal, wish: Wish, body: ImportBody) -> Published:
    if body.mix is not None:
        if body.source is not None:
            raise InvalidRequest("'source' is an adapter's, and 'mix' is made of others. Send one.", param="source")
        return await saved(catalog, wish, body)
    _require_admin(caller)
    body.check_no_mix()
    if body.source is None:
        raise InvalidRequest("The field 'source' is required, or 'mix' for a mix of adapters.", param="source")
    return await catalog.import_from(wish, body.source)


def _payer(caller: Principal) -> Payer:
    return Payer(caller.tenant, caller.weight)


def _require_admin(caller: Principal) -> None:
    if not has_role(caller, Role.ADMIN):
        raise PermissionDenied("Importing from a source needs a key with the role 'admin'. Upload the files instead.")


async def _stream(request: Request) -> AsyncIterator[bytes]:
    async for chunk in request.stream():
        if chunk:
            yield chunk


def _published(request: Request, catalog: Catalog, done: Published) -> Response:
    request.scope.setdefault("manylora.log", {})["adapter"] = done.version.ref.label
    view = _version_view(catalog, done.adapter, done.version)
    return JSONResponse(view, 201 if done.is_new else 200)


def _add_reads(router: APIRouter, catalog: Catalog) -> None:
    @router.get("/v1/adapters")
    async def list_adapters(
        caller: Caller,
        limit: Annotated[int, Query(ge=1, le=1000)] = 50,
        after: str | None = None,
        tenant: TenantQuery = None,
    ) -> Response:
        """The adapters that the caller may use, newest first; an admin sees all tenants'."""
        records, has_more = await catalog.page(_listed_tenants(caller, tenant), limit, after)
        data = [adapter_view(catalog, record, caller) for record in records]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
        return JSONResponse({"object": "list", "data": data, **ends, "has_more": has_more})

    @router.get("/v1/adapters/{name}")
    async def get_adapter(
        name: str,
        caller: Caller,
        limit: Annotated[int, Query(ge=1, le=MAX_VERSIONS)] = MAX_VERSIONS,
        before: Annotated[int | None, Query(ge=1, lt=2**31)] = None,
        tenant: TenantQuery = None,
    ) -> Response:
        """One adapter with its newest versions and the active one, or with those older than `before`; oldest first."""
        with as_asked(name):
            owner = await owner_for(catalog, caller, name, tenant)
            record, page = await catalog.versions(owner, name, limit, before)
        versions = [_version_view(catalog, record, version) for version in page.versions]
        shown = {"versions": versions, "next_before": page.next_before}
        return JSONResponse({**adapter_view(catalog, record, caller), **shown})

    @router.get("/v1/adapters/{name}/versions/{n}")
    async def get_version(name: str, n: str, caller: Caller, tenant: TenantQuery = None) -> Response:
        """One version with its validation report."""
        record, version = await version_of(catalog, caller, name, n, tenant)
        return JSONResponse(_version_view(catalog, record, version))

    @router.get("/v1/adapters/{name}/versions/{n}/card")
    async def get_card(name: str, n: str, caller: Caller, tenant: TenantQuery = None) -> Response:
        """The version's README.md as it came in, and the prompts that its front matter gives as examples."""
        _, version = await version_of(catalog, caller, name, n, tenant)
        text = await catalog.card(version)
        if not text:
            raise NotFound(f"'{version.ref.label}' has no card. Upload it again with a README.md beside its files.")
        facts = {"object": "adapter.card", "name": version.ref.name, "version": version.ref.version}
        return JSONResponse({**facts, "text": text, "examples": await asyncio.to_thread(examples_of, text)})

    @router.get("/v1/adapters/{name}/versions/{n}/download")
    async def download_version(name: str, n: str, caller: Manager, tenant: TenantQuery = None) -> Response:
        """The version as a .tar.gz in PEFT layout, its files byte for byte as they came in."""
        _, version = await version_of(catalog, caller, name, n, tenant)
        file = await catalog.download(version)
        headers = {
            "content-disposition": f'attachment; filename="{version.ref.name}-{version.ref.version}.tar.gz"',
            "content-length": str(file.seek(0, 2)),
        }
        file.seek(0)
        return StreamingResponse(_chunks(file), media_type="application/gzip", headers=headers)


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


async def owner_for(
    catalog: Catalog,
    caller: Principal,
    name: str,
    tenant: str | None,
    *,
    version: int | None = None,
    for_change: bool = False,
) -> str:
    """`owner_of`, with a look at what other servers have published where it is not known here."""
    find = partial(owner_of, catalog.directory, caller, name, tenant, version=version, for_change=for_change)
    return await looked_up(find, catalog.following)


def _listed_tenants(caller: Principal, tenant: str | None) -> list[str] | None:
    if has_role(caller, Role.ADMIN):
        return None if tenant is None else [tenant]
    visible = [caller.tenant, *([PUBLIC_TENANT] if caller.tenant != PUBLIC_TENANT else [])]
    return visible if tenant is None else [t for t in visible if t == tenant]


@contextmanager
def as_asked(label: str) -> Iterator[None]:
    """What is missing is called as the caller wrote it."""
    try:
        yield
    except AdapterNotFound:
        raise not_found(label) from None


async def version_of(
    catalog: Catalog, caller: Principal, name: str, n: str, tenant: str | None
) -> tuple[AdapterRecord, VersionRecord]:
    """The version that a path names, if the caller may see it. Raises AdapterNotFound."""
    number = version_number(name, n)
    with as_asked(f"{name}@{n}"):
        return await catalog.get_version(await owner_for(catalog, caller, name, tenant), name, number)


def _add_changes(router: APIRouter, catalog: Catalog) -> None:
    @router.patch("/v1/adapters/{name}", openapi_extra=documented("PatchBody"))
    async def change_adapter(request: Request, name: str, caller: Manager, tenant: TenantQuery = None) -> Response:
        """Promote or roll back, pin, describe, set the active version's defaults: all in one step.

        Running requests keep what they began with.
        """
        body = await read_body(request, PatchBody)
        owner = await owner_for(catalog, caller, name, tenant, for_change=True)
        record = await catalog.update(
            owner,
            name,
            active_version=body.active_version,
            pinned=body.pinned,
            description=body.description,
            defaults=body.defaults,
            if_active=body.if_active,
            author=author_of(caller, body.note),
        )
        return JSONResponse(adapter_view(catalog, record, caller))

    @router.delete("/v1/adapters/{name}", status_code=204)
    async def delete_adapter(name: str, caller: Manager, tenant: TenantQuery = None) -> Response:
        """Unpublish every version at once; running requests finish."""
        owner = await owner_for(catalog, caller, name, tenant, for_change=True)
        await catalog.delete(owner, name, author=author_of(caller))
        return Response(status_code=204)

    @router.delete("/v1/adapters/{name}/versions/{n}", status_code=204)
    async def delete_version(name: str, n: str, caller: Manager, tenant: TenantQuery = None) -> Response:
        """Unpublish one version; 409 for the active one of several."""
        number = version_number(name, n)
        owner = await owner_for(catalog, caller, name, tenant, version=number, for_change=True)
        await catalog.delete(owner, name, number, author=author_of(caller))
        return Response(status_code=204)


def _add_openai(router: APIRouter, catalog: Catalog) -> None:
    @router.delete("/v1/models/{model_id:path}")
    async def delete_model(model_id: str, caller: Manager, services: ServicesDep) -> Response:
        """Delete an adapter with all its versions, or `<adapter>@<n>`: OpenAI's way to say it."""
        named = parse_model(model_id, services.engine.model.name)
        if named is None:
            raise PermissionDenied(f"'{quoted(model_id)}' is the base that this server serves. It is not deleted.")
        owner = await owner_for(catalog, caller, named.name, named.owner, version=named.version, for_change=True)
        await catalog.delete(owner, named.name, named.version, author=author_of(caller))
        return JSONResponse({"id": model_id, "object": "model", "deleted": True})


def _add_vllm(router: APIRouter, catalog: Catalog) -> None:
    @router.post("/v1/load_lora_adapter", openapi_extra=documented("LoadBody"))
    async def load_lora_adapter(request: Request, caller: Admin) -> Response:
        """As vLLM's: register the folder `lora_path`, which must be inside the allow-list."""
        body = await read_body(request, LoadBody)
        if not body.load_inplace and catalog.directory.own(caller.tenant, body.lora_name) is not None:
            raise InvalidRequest(
                f"The lora adapter '{body.lora_name}' has already been loaded. "
                "To load it again in place, set 'load_inplace' to true.",
                param="lora_name",
            )
        with _as_vllm_names_them():
            wish = Wish(caller.tenant, body.lora_name, activate=True, payer=_payer(caller), author=author_of(caller))
            done = await catalog.import_from(wish, _source_of(body.lora_path))
        return PlainTextResponse(f"Success: LoRA adapter '{done.version.ref.name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", openapi_extra=documented("UnloadBody"))
    async def unload_lora_adapter(request: Request, caller: Admin) -> Response:
        """As vLLM's: delete the adapter with all its versions."""
        body = await read_body(request, UnloadBody)
        owner = await owner_for(catalog, caller, body.lora_name, None, for_change=True)
        await catalog.delete(owner, body.lora_name, author=author_of(caller))
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _source_of(path: str) -> str:
    """The source that a `lora_path` means. Raises InvalidRequest."""
    if path.startswith("/"):
        return f"file://{path}"
    if "://" in path:
        return path
    raise InvalidRequest(
        f"'lora_path' is '{quoted(path)}', a relative path: send an absolute one, or hf://OWNER/REPO or s3://BUCKET/PREFIX.",
        param="lora_path",
    )


@contextmanager
def _as_vllm_names_them() -> Iterator[None]:
    """Errors about fields of our own import name those that were sent."""
    names = {"name": "lora_name", "source": "lora_path"}
    try:
        yield
    except (InvalidRequest, PermissionDenied) as error:
        if error.param not in names:
            raise
        message = error.message
        for own, sent in names.items():
            message = message.replace(f"'{own}'", f"'{sent}'")
        raise type(error)(message, param=names[error.param]) from None


def _version_view(catalog: Catalog, adapter: AdapterRecord, version: VersionRecord) -> dict[str, Any]:
    """`adapter.version`, as the API documents it."""
    is_active = version.ref.version == adapter.active_version
    return {
        "id": version.ref.id,
        "object": "adapter.version",
        "name": version.ref.name,
        "version": version.ref.version,
        "digest": version.ref.digest,
        "status": _status(catalog, version),
        "active": is_active,
        "active_version": adapter.active_version,
        "pinned": adapter.pinned and is_active,
        "tenant": version.ref.tenant,
        "kind": version.kind,
        "rank": version.rank,
        "alpha": version.alpha,
        "target_modules": list(version.target_modules),
        "size_bytes": version.size_bytes,
        "mix": _mix_view(version),
        "created": version.created_s,
        "card_bytes": version.card_bytes,
        "lineage": shown(version.lineage),
        "tier": catalog.tier_of(version.ref),
        "defaults": shown(version.defaults),
        "report": {"base_model": None, **version.report, "base_model_differs": catalog.has_other_name(version)},
    }


def _mix_view(version: VersionRecord) -> list[dict[str, Any]] | None:
    """The versions that a mix is made of; null for a version with files."""
    return [part.model_dump(exclude={"digest"}) for part in version.mix] or None


def _canary_view(catalog: Catalog, adapter: AdapterRecord) -> dict[str, Any] | None:
    """The version that answers a share of the requests for the bare name, as this server does it."""
    entry = catalog.directory.own(adapter.tenant, adapter.name)
    canary = None if entry is None else entry.canary
    return None if canary is None else {"version": canary.version, "share": canary.share}


def _status(catalog: Catalog, version: VersionRecord) -> str:
    if not version.is_ready:
        return _OTHER_BASE
    return "ready" if catalog.directory.has_parts(version.mix) else _MISSING_PART


def adapter_view(catalog: Catalog, adapter: AdapterRecord, caller: Principal) -> dict[str, Any]:
    """`adapter`: a name with what its active version is; the facts of it are null where none is active.

    Its canary is null as well for a caller who may only use the adapter.
    """
    active = adapter.active
    return {
        "id": adapter.id,
        "object": "adapter",
        "name": adapter.name,
        "tenant": adapter.tenant,
        "description": adapter.description,
        "active_version": adapter.active_version,
        "status": _status(catalog, active) if active else None,
        "base_model": active.report.get("base_model") if active else None,
        "base_model_differs": active is not None and catalog.has_other_name(active),
        "newest_version": adapter.sums.newest,
        "num_versions": adapter.sums.count,
        "pinned": adapter.pinned,
        "canary": _canary_view(catalog, adapter) if answers_for(caller, adapter.tenant) else None,
        "created": adapter.created_s,
        "digest": active.ref.digest if active else None,
        "rank": active.rank if active else None,
        "size_bytes": adapter.sums.size_bytes,
        "mix": _mix_view(active) if active else None,
        "card_bytes": active.card_bytes if active else None,
        "lineage": shown(active.lineage) if active else None,
        "tier": catalog.tier_of(active.ref) if active else None,
        "defaults": shown(active.defaults) if active else None,
    }
