"""`/api/chat`, `/api/generate`, `/api/tags`, `/api/show` and `/api/version`: Ollama's protocol, as a thin layer.

A model is `<name>` or `<name>:latest`, of the base or of an adapter. A body becomes one of this server's own requests;
streams, which are the default, are lines of JSON.
"""

from datetime import UTC, datetime
from itertools import islice
from typing import Annotated, Any, ClassVar, Final, TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import Response

from manylora import __version__
from manylora.api.auth import Caller
from manylora.api.errors import invalid_from
from manylora.api.fields import NOTHING, Unsupported, renamed, wanted
from manylora.api.json_body import documented, parse_json
from manylora.api.lanes import PYTHON, beside_loop
from manylora.api.naming import parse_model, resolve, without_alias
from manylora.api.ollama_answers import ChatShape, GenerateShape, OllamaAnswer
from manylora.api.openai import MAX_MODELS, published
from manylora.api.requests import read_body
from manylora.api.run import Asked, answered
from manylora.api.schemas import ChatRequest, CompletionRequest, Int, checked
from manylora.api.sse import LineStream
from manylora.api.state import Services, ServicesDep
from manylora.engine.interface import AdapterRef
from manylora.errors import InvalidRequest

__all__ = ["OllamaChatRequest", "OllamaGenerateRequest", "router"]

_TAG: Final = ":latest"
_BOTH: Final[Unsupported] = {"keep_alive": NOTHING, "think": NOTHING}
_CHAT: Final[Unsupported] = {"tools": NOTHING, **_BOTH}
_GENERATE: Final[Unsupported] = {
    "suffix": NOTHING,
    "images": NOTHING,
    "template": NOTHING,
    "context": NOTHING,
    "width": NOTHING,
    "height": NOTHING,
    "steps": NOTHING,
    **_BOTH,
}
_MESSAGE: Final[Unsupported] = {"images": NOTHING, "tool_calls": NOTHING, "tool_name": NOTHING, "thinking": NOTHING}
# Of the model's start, which is the server's here: `manylora serve` has settings for it.
_OPTIONS: Final[Unsupported] = {
    **dict.fromkeys(("numa", "num_batch", "num_gpu", "main_gpu", "num_thread", "num_ctx", "num_keep"), NOTHING),
    **dict.fromkeys(("low_vram", "f16_kv", "logits_all", "vocab_only", "use_mmap", "use_mlock"), NOTHING),
    "embedding_only": NOTHING,
    "mirostat": (0, *NOTHING),
    "mirostat_eta": NOTHING,
    "mirostat_tau": NOTHING,
    "penalize_newline": (True, *NOTHING),
    "repeat_last_n": (-1, *NOTHING),  # the whole context counts
    "tfs_z": (1, *NOTHING),
}
# What this server's own requests call each field, and what it is called here.
_NAMES: Final = {
    "max_tokens": "options.num_predict",
    **{name: f"options.{name}" for name in ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed", "stop")},
    **{name: f"options.{name}" for name in ("presence_penalty", "frequency_penalty")},
    "repetition_penalty": "options.repeat_penalty",
    "structured_outputs.json": "format",
    "structured_outputs": "format",
}


T = TypeVar("T", bound=BaseModel)


class _Strict(BaseModel):
    """Unknown fields are refused, and a string is not a number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class Options(_Strict):
    """`options`: how to choose tokens. What is left out is the model's own."""

    num_predict: Int | None = Field(default=None, ge=-2, description="-1 and -2: the rest of the context.")
    temperature: float | None = None
    top_k: Int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    seed: Int | None = Field(default=None, description="-1: random.")
    stop: str | list[str] | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None


class _Asked(_Strict):
    """What both routes have in common."""

    model: Annotated[str, Field(min_length=1)]
    stream: bool = True
    format: dict[str, Any] | str | None = Field(default=None, description="`json`, or a JSON schema.")
    options: Options = Options()
    logprobs: bool = False
    top_logprobs: Int | None = Field(default=None, ge=0)


class OllamaChatRequest(_Asked):
    """`POST /api/chat`."""

    messages: list[dict[str, Any]] = Field(min_length=1)


class OllamaGenerateRequest(_Asked):
    """`POST /api/generate`."""

    prompt: Annotated[str, Field(min_length=1)]
    system: str | None = None
    raw: bool = Field(default=False, description="The prompt as it is, and not as a chat's message.")


class ShowRequest(_Strict):
    """`POST /api/show`."""

    model: str | None = None
    name: str | None = None
    verbose: bool = False


class _Completion(CompletionRequest):
    """A completion that may fill the context where nothing bounds it."""

    default_max_tokens: ClassVar[int | None] = None


def _read_chat(data: bytes) -> Asked:
    raw = _cleaned(parse_json(data), OllamaChatRequest, _CHAT)
    if isinstance(raw.get("messages"), list):
        raw["messages"] = [_cleaned_message(each, number) for number, each in enumerate(raw["messages"])]
    body = _checked(OllamaChatRequest, raw)
    return _in_our_words(body, {"messages": body.messages}, ChatShape(body.model))


def _read_generate(data: bytes) -> Asked:
    body = _checked(OllamaGenerateRequest, _cleaned(parse_json(data), OllamaGenerateRequest, _GENERATE))
    if body.raw:
        if body.system is not None:
            raise InvalidRequest("'system' has no place in a raw prompt. Leave it out.", param="system")
        return _in_our_words(body, {"prompt": body.prompt}, GenerateShape(body.model))
    system = [] if body.system is None else [{"role": "system", "content": body.system}]
    messages = [*system, {"role": "user", "content": body.prompt}]
    return _in_our_words(body, {"messages": messages}, GenerateShape(body.model))


def _cleaned(raw: Any, schema: type[BaseModel], unsupported: Unsupported) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise InvalidRequest("The body must be a JSON object.")
    kept = wanted(raw, schema.model_fields, unsupported)
    if isinstance(kept.get("options"), dict):
        kept["options"] = wanted(kept["options"], Options.model_fields, _OPTIONS, where="options.")
    return kept


def _cleaned_message(message: Any, number: int) -> Any:
    if not isinstance(message, dict):
        return message
    return wanted(message, ("role", "content"), _MESSAGE, where=f"messages[{number}].")


def _checked(schema: type[T], raw: dict[str, Any]) -> T:
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise invalid_from(error.errors(include_url=False, include_input=False)) from None


def _in_our_words(body: _Asked, text: dict[str, Any], shape: ChatShape) -> Asked:
    options = body.options
    is_chat = "messages" in text
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
    top = {"logprobs": True, "top_logprobs": body.top_logprobs} if is_chat else {"logprobs": body.top_logprobs or 0}
    asked: dict[str, Any] = {
        **text,
        "model": _untagged(body.model),
        "stream": body.stream,
        "max_tokens": None if options.num_predict in (None, -1, -2) else options.num_predict,
        **options.model_dump(exclude={"num_predict", "seed", "repeat_penalty"}),
        "seed": None if options.seed == -1 else options.seed,
        "repetition_penalty": options.repeat_penalty,
        "structured_outputs": _structure(body.format),
        **(top if body.logprobs else {}),
    }
    try:
        ours = checked(ChatRequest, asked) if is_chat else checked(_Completion, asked)
    except InvalidRequest as error:
        raise renamed(error, _NAMES) from None
    return Asked(ours, lambda run: OllamaAnswer(run, shape), names=_NAMES, stream=LineStream)


def _structure(form: dict[str, Any] | str | None) -> dict[str, Any] | None:
    if form in (None, ""):
        return None
    if form == "json":
        return {"json_object": True}
    if isinstance(form, str):
        raise InvalidRequest("'format' must be 'json' or a JSON schema.", param="format")
    return {"json": form}


def _untagged(name: str) -> str:
    """There is one version under a name, the active one, which Ollama's tag means; others are `<name>@<n>`."""
    return name.removesuffix(_TAG)


# routes

router = APIRouter(tags=["Ollama"])


@router.post("/api/chat", openapi_extra=documented("OllamaChatRequest"))
async def chat(request: Request, caller: Caller, services: ServicesDep) -> Response:
    """Answer a chat."""
    return await answered(request, caller, services, _read_chat)


@router.post("/api/generate", openapi_extra=documented("OllamaGenerateRequest"))
async def generate(request: Request, caller: Caller, services: ServicesDep) -> Response:
    """Answer one message, or with `raw` continue a text."""
    return await answered(request, caller, services, _read_generate)


@router.get("/api/version")
async def version() -> dict[str, str]:
    """This server's own version."""
    return {"version": __version__}


@router.get("/api/tags")
async def tags(caller: Caller, services: ServicesDep) -> dict[str, Any]:
    """The base and the adapters that the caller may name."""
    return await beside_loop(PYTHON, _listed, services, caller.tenant)


def _listed(services: Services, tenant: str) -> dict[str, Any]:
    model = services.engine.model
    found = islice(services.directory.visible_to(tenant), MAX_MODELS - 1)
    adapters = [_entry(services, each.ref.name, each.created, each.ref) for each in found]
    return {"models": [_entry(services, model.name, model.created, None), *adapters]}


def _entry(services: Services, name: str, created: int, ref: AdapterRef | None) -> dict[str, Any]:
    tagged = f"{name}{_TAG}"
    return {
        "name": tagged,
        "model": tagged,
        "modified_at": datetime.fromtimestamp(created, UTC).isoformat(),
        "digest": ref.digest if ref else "",
        "details": _details(services, ref),
    }


def _details(services: Services, ref: AdapterRef | None) -> dict[str, Any]:
    return {"parent_model": services.engine.model.name if ref else "", "format": "safetensors"}


@router.post(
    "/api/show",
    openapi_extra={"requestBody": {"content": {"application/json": {"schema": ShowRequest.model_json_schema()}}}},
)
async def show(request: Request, caller: Caller, services: ServicesDep) -> dict[str, Any]:
    """One of them."""
    body = await read_body(request, lambda data: _checked(ShowRequest, _cleaned(parse_json(data), ShowRequest, {})))
    name = body.model or body.name
    if name is None:
        raise InvalidRequest("The field 'model' is required.", param="model")
    model, aliases = services.engine.model, services.settings.resolved_model_aliases
    named = without_alias(services.directory, caller.tenant, model.name, aliases, _untagged(name))
    wanted_adapter = parse_model(named, model.name)
    ref, created = None, model.created
    if wanted_adapter is not None:
        ref = resolve(services.directory, caller.tenant, wanted_adapter, written=name, param="model")
        found = published(services, caller.tenant, ref.name)
        created = found.created if found is not None else created
    return {
        "modified_at": datetime.fromtimestamp(created, UTC).isoformat(),
        "details": _details(services, ref),
        "model_info": {
            "general.architecture": "manylora",
            "general.name": ref.label if ref else model.name,
            "manylora.context_length": model.context_length,
            "manylora.vocab_size": model.vocab_size,
        },
        "capabilities": ["completion"],
    }
