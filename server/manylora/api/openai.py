"""`/v1/completions`, `/v1/chat/completions` and `/v1/models`."""

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Annotated, Any, Final

import orjson
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from manylora.api.answers import ChatAnswer, CompletionAnswer
from manylora.api.auth import Caller
from manylora.api.json_body import documented, parse_json
from manylora.api.lanes import PYTHON, beside_loop
from manylora.api.naming import looked_up, parse_model, resolve, without_alias
from manylora.api.run import Asked, answered
from manylora.api.schemas import ChatRequest, CompletionRequest, checked
from manylora.api.state import Services, ServicesDep
from manylora.catalog.interface import PublishedAdapter
from manylora.engine.interface import AdapterRef
from manylora.errors import AdapterNotFound

__all__ = ["chat", "completion", "published", "router"]

# OpenAI's clients take a list of models for whole: few have more than this, and who pages can have all.
MAX_MODELS: Final = 10_000
router = APIRouter(tags=["inference"])


@router.post("/v1/completions", openapi_extra=documented("CompletionRequest"))
async def create_completion(request: Request, caller: Caller, services: ServicesDep) -> Response:
    """Continue a prompt: OpenAI's completions."""
    return await answered(request, caller, services, lambda data: completion(parse_json(data)))


@router.post("/v1/chat/completions", openapi_extra=documented("ChatRequest"))
async def create_chat_completion(request: Request, caller: Caller, services: ServicesDep) -> Response:
    """Answer a chat: OpenAI's chat completions."""
    return await answered(request, caller, services, lambda data: chat(parse_json(data)))


def completion(raw: Any) -> Asked:
    """What a completion's body, parsed, asks for. Raises InvalidRequest."""
    body = checked(CompletionRequest, raw)
    return Asked(body, lambda run: CompletionAnswer(run, body))


def chat(raw: Any) -> Asked:
    """What a chat's body, parsed, asks for. Raises InvalidRequest."""
    body = checked(ChatRequest, raw)
    return Asked(body, lambda run: ChatAnswer(run, body))


@router.get("/v1/models")
async def list_models(
    caller: Caller,
    services: ServicesDep,
    limit: Annotated[int, Query(ge=1, le=MAX_MODELS)] = MAX_MODELS,
    after: Annotated[str | None, Query(description="The `last_id` of the page before.")] = None,
) -> Response:
    """The base and the adapters that the caller may name, by name."""
    body = await beside_loop(PYTHON, _models_page, services, caller.tenant, limit, after)
    return Response(body, media_type="application/json")


def _models_page(services: Services, tenant: str, limit: int, after: str | None) -> bytes:
    model = services.engine.model
    is_first = after is None or after == model.name
    data = [_base_entry(services, model.created)] if after is None else []
    room = limit - len(data)
    start = "" if is_first else f"{after}\0"  # no name comes between the two
    found = list(islice(services.directory.visible_to(tenant, start), room + 1))
    data += [_adapter_entry(services, p.ref, p.created, p.ref.name) for p in found[:room]]
    has_more = len(found) > room
    if not has_more:
        data += _aliases(services, tenant)
    ids = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return orjson.dumps({"object": "list", "data": data, **ids, "has_more": has_more})


def _aliases(services: Services, tenant: str) -> Iterator[dict[str, Any]]:
    """The entries of the aliases that lead somewhere for this tenant, as those tools look for them."""
    base, aliases = services.engine.model, services.settings.resolved_model_aliases
    for alias, name in aliases.items():
        if without_alias(services.directory, tenant, base.name, aliases, alias) == alias:
            continue
        if name == base.name:
            yield _base_entry(services, base.created) | {"id": alias}
            continue
        with suppress(AdapterNotFound):
            wanted = parse_model(name, base.name)
            if wanted is not None:
                ref = resolve(services.directory, tenant, wanted, written=alias, param="model")
                found = published(services, tenant, ref.name)
                is_active = found is not None and found.ref == ref
                yield _adapter_entry(services, ref, found.created if found and is_active else base.created, alias)


def published(services: Services, tenant: str, name: str) -> PublishedAdapter | None:
    """The adapter of that name, where it has an active version."""
    first = next(services.directory.visible_to(tenant, name), None)
    return first if first is not None and first.ref.name == name else None


@router.get("/v1/models/{model_id:path}")
async def get_model(model_id: str, caller: Caller, services: ServicesDep) -> dict[str, Any]:
    """One of them, by any of the names that `model` takes. `created` is the active version's."""
    base = services.engine.model
    named = without_alias(
        services.directory, caller.tenant, base.name, services.settings.resolved_model_aliases, model_id
    )
    wanted = parse_model(named, base.name)
    if wanted is None:
        return _base_entry(services, base.created) | {"id": model_id}
    find = partial(resolve, services.directory, caller.tenant, wanted, written=model_id, param="model")
    ref = await looked_up(find, services.following)
    found = published(services, caller.tenant, ref.name)
    return _adapter_entry(services, ref, base.created if found is None else found.created, model_id)


def _base_entry(services: Services, created: int) -> dict[str, Any]:
    name = services.engine.model.name
    return _entry(services, name, created, owned_by="manylora", root=name, parent=None)


def _adapter_entry(services: Services, ref: AdapterRef, created: int, model_id: str) -> dict[str, Any]:
    return _entry(services, model_id, created, owned_by=ref.tenant, root=ref.digest, parent=services.engine.model.name)


def _entry(
    services: Services, model_id: str, created: int, *, owned_by: str, root: str, parent: str | None
) -> dict[str, Any]:
    return {
        "id": model_id,
        "object": "model",
        "created": created,
        "owned_by": owned_by,
        "root": root,
        "parent": parent,
        "max_model_len": services.engine.model.context_length,
    }
