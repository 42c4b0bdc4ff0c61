"""`/api/chat`, `/api/generate`, `/api/tags`, `/api/show` and `/api/version`: Ollama's protocol, as a thin layer.

A model is `<name>` or `<name>:latest`, of the base or of an adapter. A body becomes one of this server's own requests;
streams, which are the default, are lines of JSON.
"""

from datetime import UTC, datetime
from functools import partial
from itertools import islice
from typing import Annotated, Any, ClassVar, Final, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, field_validator
from starlette.responses import Response

from manylora import __version__
from manylora.api.auth import Caller
from manylora.api.fields import NOTHING, Unsupported, asks_for_nothing, renamed, wanted
from manylora.api.json_body import documented, parse_json
from manylora.api.lanes import PYTHON, beside_loop
from manylora.api.naming import looked_up, parse_model, resolve, without_alias
from manylora.api.ollama_answers import ChatShape, GenerateShape, OllamaAnswer
from manylora.api.openai import MAX_MODELS, published
from manylora.api.requests import read_body
from manylora.api.run import Asked, answered
from manylora.api.schemas import ChatRequest, CompletionRequest, Int, checked, checked_stops
from manylora.api.sse import LineStream
from manylora.api.state import Services, ServicesDep
from manylora.api.strict import Strict
from manylora.api.tools import MAX_TOOLS
from manylora.api.translation import valid
from manylora.chat.format import ChatFormat
from manylora.engine.interface import AdapterRef
from manylora.errors import InvalidRequest

__all__ = ["OllamaChatRequest", "OllamaGenerateRequest", "router"]

_TAG: Final = ":latest"
_CHAT: Final[Unsupported] = {"keep_alive": NOTHING}
_GENERATE: Final[Unsupported] = {
    "suffix": NOTHING,
    "images": NOTHING,
    "template": NOTHING,
    "context": NOTHING,
    "width": NOTHING,
    "height": NOTHING,
    "steps": NOTHING,
    **_CHAT,
}
_MESSAGE: Final[Unsupported] = {"images": NOTHING}
# What a message's fields are called in this server's own chats.
_OURS: Final = {
    "role": "role",
    "content": "content",
    "thinking": "reasoning_content",
    "tool_calls": "tool_calls",
    "tool_name": "name",
    "tool_call_id": "tool_call_id",
}
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
    "reasoning_effort": "think",
    "structured_outputs.json": "format",
    "structured_outputs": "format",
}


class Options(Strict):
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

    _check_stop = field_validator("stop", mode="plain", json_schema_input_type=str | list[str] | None)(checked_stops)


class _Asked(Strict):
    """What both routes have in common."""

    model: Annotated[str, Field(min_length=1)]
    stream: bool = True
    format: dict[str, Any] | str | None = Field(default=None, description="`json`, or a JSON schema.")
    options: Options = Options()
    logprobs: bool = False
    top_logprobs: Int | None = Field(default=None, ge=0)
    think: bool | Literal["low", "medium", "high", "max"] | None = Field(
        default=None, description="Whether the base thinks, and how much, as far as its template asks."
    )


class OllamaChatRequest(_Asked):
    """`POST /api/chat`."""

    messages: list[dict[str, Any]] = Field(min_length=1, fail_fast=True)
    tools: list[dict[str, Any]] = Field(
        default=[], max_length=MAX_TOOLS, fail_fast=True, description="As OpenAI describes them."
    )


class OllamaGenerateRequest(_Asked):
    """`POST /api/generate`."""

    prompt: Annotated[str, Field(min_length=1)]
    system: str | None = None
    raw: bool = Field(default=False, description="The prompt as it is, and not as a chat's message.")


class ShowRequest(Strict):
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
    body = valid(OllamaChatRequest, raw)
    tools = [{"type": "function", **tool} for tool in body.tools]
    return _in_our_words(body, {"messages": body.messages, "tools": tools}, ChatShape(body.model))


def _read_generate(data: bytes) -> Asked:
    body = valid(OllamaGenerateRequest, _cleaned(parse_json(data), OllamaGenerateRequest, _GENERATE))
    if body.raw:
        if body.system is not None:
            raise InvalidRequest("'system' has no place in a raw prompt. Leave it out.", param="system")
        if body.think:
            raise InvalidRequest("'think' has no place in a raw prompt. Leave it out.", param="think")
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
    for name in ("tools", "think"):
        if name in kept and kept[name] is not False and asks_for_nothing(kept[name]):
            del kept[name]
    return kept


def _cleaned_message(message: Any, number: int) -> Any:
    if not isinstance(message, dict):
        return message
    kept = wanted(message, _OURS, _MESSAGE, where=f"messages[{number}].")
    if isinstance(kept.get("tool_calls"), list):
        kept["tool_calls"] = [_cleaned_call(call) for call in kept["tool_calls"]]
    return {_OURS[name]: value for name, value in kept.items()}


def _cleaned_call(call: Any) -> Any:
    """A call without the number that answers give it."""
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        return call
    return {**call, "function": {name: value for name, value in call["function"].items() if name != "index"}}


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
        **(_thinking(body.think) if is_chat else {}),
    }
    names = {**_names_of_messages(len(asked.get("messages", ()))), **_NAMES}
    try:
        ours = checked(ChatRequest, asked) if is_chat else checked(_Completion, asked)
    except InvalidRequest as error:
        raise renamed(error, names) from None
    has_thoughts = body.think is not False
    return Asked(ours, lambda run: OllamaAnswer(run, shape, has_thoughts=has_thoughts), names=names, stream=LineStream)


def _thinking(think: bool | str | None) -> dict[str, Any]:
    """What a template is told of it, where anything is."""
    if think is None:
        return {}
    effort = think if isinstance(think, str) else None
    return {"chat_template_kwargs": {"enable_thinking": think is not False}, "reasoning_effort": effort}


def _names_of_messages(num_messages: int) -> dict[str, str]:
    """What is called otherwise in each message."""
    renamed_fields = [(ours, own) for own, ours in _OURS.items() if ours != own]
    return {
        f"messages[{number}].{ours}": f"messages[{number}].{own}"
        for number in range(num_messages)
        for ours, own in renamed_fields
    }


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
    """The version of manylora that runs, in Ollama's shape."""
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
    body = await read_body(request, lambda data: valid(ShowRequest, _cleaned(parse_json(data), ShowRequest, {})))
    name = body.model or body.name
    if name is None:
        raise InvalidRequest("The field 'model' is required.", param="model")
    model, aliases = services.engine.model, services.settings.resolved_model_aliases
    named = without_alias(services.directory, caller.tenant, model.name, aliases, _untagged(name))
    wanted_adapter = parse_model(named, model.name)
    ref, created = None, model.created
    if wanted_adapter is not None:
        find = partial(resolve, services.directory, caller.tenant, wanted_adapter, written=name, param="model")
        ref = await looked_up(find, services.following)
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
        "capabilities": _capabilities(services.engine.codec.chat_format()),
    }


def _capabilities(form: ChatFormat) -> list[str]:
    """What the base's template has a place for."""
    has_calls = form.takes_tools and (form.syntax is not None or form.has_response_template)
    found = {"completion": True, "tools": has_calls, "thinking": form.reasoning is not None}
    return [name for name, is_there in found.items() if is_there]
