"""`/v1/completions`, `/v1/chat/completions` and `/v1/models`."""

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from itertools import islice
from typing import Annotated, Any, Final, TypeVar

import orjson
from fastapi import APIRouter, Query, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from manylora.api.answers import Answer, ChatAnswer, CompletionAnswer
from manylora.api.auth import Caller
from manylora.api.compat import require_json
from manylora.api.lanes import PYTHON, beside_loop
from manylora.api.record import ClientGone, FinishedRequest, RequestRecord
from manylora.api.requests import (
    Prompt,
    gone_is_missing,
    parse_model,
    prompts_of,
    resolve,
    resolve_request,
    without_alias,
)
from manylora.api.run import Job, Run
from manylora.api.schemas import ChatRequest, CompletionRequest, GenerationRequest, parse
from manylora.api.sse import EventStream, while_connected
from manylora.api.state import Services, ServicesDep
from manylora.catalog.interface import PublishedAdapter
from manylora.engine.interface import AdapterRef
from manylora.errors import AdapterNotFound
from manylora.tenants.interface import Principal

__all__ = ["ADAPTER_HEADER", "router"]

ADAPTER_HEADER: Final = "x-manylora-adapter"
_INLINE_BYTES: Final = 65_536
# OpenAI's clients take a list of models for whole: few have more than this, and who pages can have all.
MAX_MODELS: Final = 10_000
T = TypeVar("T", bound=GenerationRequest)
router = APIRouter(tags=["inference"])


def _body_of(schema: str) -> dict[str, Any]:
    """The documentation of a body that the route parses itself."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"requestBody": {"required": True, "content": content}}


@router.post("/v1/completions", openapi_extra=_body_of("CompletionRequest"))
async def create_completion(request: Request, caller: Caller, services: ServicesDep) -> Response:
    """Continue a prompt: OpenAI's completions."""
    return await _Call(request, caller, services).completion()


@router.post("/v1/chat/completions", openapi_extra=_body_of("ChatRequest"))
async def create_chat_completion(request: Request, caller: Caller, services: ServicesDep) -> Response:
    """Answer a chat: OpenAI's chat completions."""
    return await _Call(request, caller, services).chat()


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
    base = services.engine.model
    for alias, name in services.settings.resolved_model_aliases.items():
        if alias == base.name or _published(services, tenant, alias) is not None:
            continue
        if name == base.name:
            yield _base_entry(services, base.created) | {"id": alias}
            continue
        with suppress(AdapterNotFound):
            wanted = parse_model(name, base.name)
            if wanted is not None:
                ref = resolve(services.directory, tenant, wanted, written=alias, param="model")
                found = _published(services, tenant, ref.name)
                is_active = found is not None and found.ref == ref
                yield _adapter_entry(services, ref, found.created if found and is_active else base.created, alias)


def _published(services: Services, tenant: str, name: str) -> PublishedAdapter | None:
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
    ref = resolve(services.directory, caller.tenant, wanted, written=model_id, param="model")
    found = _published(services, caller.tenant, ref.name)
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


class _Call:
    """One call of an inference route, from its body to its answer."""

    def __init__(self, request: Request, caller: Principal, services: Services) -> None:
        self._request = request
        self._caller = caller
        self._services = services
        self._log: dict[str, Any] = request.scope["manylora.log"]
        self._record = RequestRecord(request_id=request.scope["manylora.request_id"], tenant=caller.tenant)
        self._is_ended = False
        self._is_large = False
        services.traffic.begin(self._record)

    async def completion(self) -> Response:
        async with self._ending():
            body = await self._parsed(CompletionRequest)
            adapter = self._resolve(body)
            job = self._job(body, adapter, await self._prompts(body))
            answer = CompletionAnswer(job, self._services.engine.codec, **self._names(body), echo=body.echo)
            return await self._answer(body, job, answer)

    async def chat(self) -> Response:
        async with self._ending():
            body = await self._parsed(ChatRequest)
            adapter = self._resolve(body)
            job = self._job(body, adapter, await self._prompts(body))
            answer = ChatAnswer(job, self._services.engine.codec, **self._names(body))
            return await self._answer(body, job, answer)

    @asynccontextmanager
    async def _ending(self) -> AsyncIterator[None]:
        """Ends the record of a call that fails before its run does it."""
        try:
            yield
        except BaseException as error:
            await self._end(self._record.finish(error))
            raise

    async def _parsed(self, schema: type[T]) -> T:
        """The body. A large one is parsed and checked beside the event loop."""
        data = await self._read()
        self._is_large = len(data) > _INLINE_BYTES
        return await beside_loop(PYTHON, parse, schema, data) if self._is_large else parse(schema, data)

    async def _prompts(self, body: GenerationRequest) -> tuple[Prompt, ...]:
        """Raises ClientGone if the client of a large body has not waited for its prompts to be encoded."""
        prompts = await prompts_of(body, self._services.engine)
        if self._is_large and await self._request.is_disconnected():
            raise ClientGone
        return prompts

    async def _read(self) -> bytes:
        require_json(self._request)
        try:
            return await self._request.body()
        except ClientDisconnect:
            raise ClientGone from None

    def _resolve(self, body: CompletionRequest | ChatRequest) -> AdapterRef | None:
        self._log.update(body.annotations())
        directory, tenant, base = self._services.directory, self._caller.tenant, self._services.engine.model.name
        model = body.model
        if model is not None:
            model = without_alias(directory, tenant, base, self._services.settings.resolved_model_aliases, model)
        adapter = resolve_request(directory, tenant, base, model, body.adapter_id)
        self._record.adapter = adapter
        return adapter

    def _job(self, body: GenerationRequest, adapter: AdapterRef | None, prompts: tuple[Prompt, ...]) -> Job:
        if self._services.settings.log_prompts:
            decode = self._services.engine.codec.decode
            self._log["prompts"] = [decode(prompt.ids, skip_special_tokens=False) for prompt in prompts]
        job_id = self._log["job_id"] = uuid.uuid4().hex
        return Job(
            id=job_id,
            principal=self._caller,
            adapter=adapter,
            prompts=prompts,
            cache_salt=body.cache_salt,
        )

    def _names(self, body: CompletionRequest | ChatRequest) -> dict[str, Any]:
        label = body.model or body.adapter_id or self._services.engine.model.name
        return {"label": label, "created": int(time.time())}

    async def _answer(self, body: CompletionRequest | ChatRequest, job: Job, answer: Answer) -> Response:
        headers = {ADAPTER_HEADER: job.adapter.label if job.adapter else "base"}
        if body.stream:
            events = self._events(body, job, answer)
            return EventStream(events, headers=headers, keep_alive_s=self._services.settings.stream_keep_alive_s)
        content = await while_connected(self._request.receive, self._whole(body, job, answer))
        return Response(content, headers=headers, media_type="application/json")

    def _run(self, job: Job) -> Run:
        return Run(self._services, job, self._record, self._end)

    async def _whole(self, body: CompletionRequest | ChatRequest, job: Job, answer: Answer) -> bytes:
        with gone_is_missing(body.model, body.adapter_id):
            async with self._run(job) as run:
                return await answer.whole(run)

    async def _events(
        self, body: CompletionRequest | ChatRequest, job: Job, answer: Answer
    ) -> AsyncGenerator[bytes, None]:
        with gone_is_missing(body.model, body.adapter_id):
            async with self._run(job) as run:
                events = answer.events(run, body.usage_in_stream)
                try:
                    async for payload in events:
                        yield payload
                finally:
                    await events.aclose()

    async def _end(self, finished: FinishedRequest) -> None:
        """Called when the run ends, and when the call fails before or in it; the first call counts.

        Whoever gets an answer gets the end of it once its usage is stored.
        """
        if self._is_ended:
            return
        self._is_ended = True
        self._log.update(finished.log_fields())
        self._services.traffic.end(finished)
        self._services.metrics.observe_request(finished.sample())
        for record in self._services.recorders:
            record(finished)
        usage = self._services.usage
        if usage is not None:
            usage.add(finished.use())
            if finished.outcome != "cancelled":
                await usage.stored()
