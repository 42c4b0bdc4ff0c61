"""`/v1/responses`: OpenAI's responses, without a memory. A body becomes a chat of this server's own.

Nothing is stored: what a conversation was so far is sent with each request, and whatever would be looked up later, or
run by the server itself, is refused by name.
"""

from typing import Any, ClassVar, Final, Literal, Self, TypeAlias

from fastapi import APIRouter, Request
from pydantic import Field, field_validator, model_validator
from starlette.responses import Response

from manylora.api.auth import Caller
from manylora.api.fields import NOTHING, Unsupported, renamed, wanted
from manylora.api.json_body import documented, parse_json
from manylora.api.response_answers import ResponseAnswer, Told
from manylora.api.response_items import chat_of
from manylora.api.response_tools import chosen, offered
from manylora.api.run import Asked, answered
from manylora.api.schemas import MAX_METADATA, MAX_USER, ChatRequest, Int, ReasoningEffort, Texts, checked
from manylora.api.sse import TypedEventStream
from manylora.api.state import ServicesDep
from manylora.api.strict import Strict
from manylora.api.structured import check_goes_with
from manylora.api.tools import MAX_TOOLS
from manylora.api.translation import EXTENSIONS, documents, parted, valid
from manylora.errors import InvalidRequest

__all__ = ["ResponseRequest", "router"]

MAX_CLIENT_METADATA_LENGTH: Final = 16_384

# What goes on to a chat under its own name.
_PASSED: Final = (
    *("model", "stream", "temperature", "top_p", "parallel_tool_calls", "metadata", "user", "service_tier", "stop"),
    *EXTENSIONS,
)
_UNSUPPORTED: Final[Unsupported] = {
    "previous_response_id": NOTHING,
    "conversation": NOTHING,
    "background": NOTHING,
    "background_options": NOTHING,
    "prompt": NOTHING,
    "access_programs": NOTHING,
    "context_management": NOTHING,
    "image": NOTHING,
    "max_tool_calls": NOTHING,
    "moderation": NOTHING,
    "prompt_cache_options": NOTHING,
    "prompt_cache_retention": ("in_memory", "in-memory", *NOTHING),
    "stream_options": ({"include_obfuscation": False}, *NOTHING),
}
_TEXT: Final[Unsupported] = {"verbosity": ("medium", *NOTHING)}
_REASONING: Final[Unsupported] = {"context": ("auto", *NOTHING), "mode": ("standard", *NOTHING)}
_FORMAT: Final = {"json_schema": ("name", "description", "schema_", "strict")}
_NOTED: Final = ("safety_identifier", "prompt_cache_key", "client_metadata")
# What a chat calls each field, and what it is called here.
_NAMES: Final = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}


Included: TypeAlias = Literal["reasoning.encrypted_content", "message.output_text.logprobs"]


class Format(Strict):
    """`text.format`: what the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(Strict):
    """`text`."""

    format: Format | None = None


class ReasoningOptions(Strict):
    """`reasoning`. With a `summary` thoughts stand there, as they are, in place of `content`."""

    effort: ReasoningEffort | None = None
    summary: Literal["auto", "detailed"] | None = None
    generate_summary: Literal["auto", "detailed"] | None = Field(default=None, description="Older name of `summary`.")

    @model_validator(mode="after")
    def _check_summaries(self) -> Self:
        if None not in (self.summary, self.generate_summary) and self.summary != self.generate_summary:
            raise InvalidRequest(
                "'reasoning.summary' and 'reasoning.generate_summary' differ. Send one.",
                param="reasoning.generate_summary",
            )
        return self


class ResponseRequest(Strict):
    """`POST /v1/responses`."""

    model_config = documents(*_PASSED)

    input: str | list[Any] = Field(description="Text, or messages, calls, what they returned, and thoughts.")
    instructions: str | None = None
    max_output_tokens: Int | None = Field(default=None, ge=1, description="Left out: the rest of the context.")
    tools: list[dict[str, Any]] = Field(default=[], max_length=MAX_TOOLS, fail_fast=True)
    tool_choice: str | dict[str, Any] | None = None
    text: dict[str, Any] = Field(default={}, description="`format`: what the answer must look like.")
    reasoning: dict[str, Any] = Field(default={}, description="`effort` and `summary`.")
    include: list[Included] = Field(default=[], fail_fast=True)
    top_logprobs: Int | None = Field(default=None, ge=0)
    truncation: Literal["auto", "disabled"] | None = Field(default=None, description="`auto`: old turns are dropped.")
    store: bool | None = Field(default=None, description="Nothing is stored in any case.")
    safety_identifier: str | None = Field(default=None, max_length=MAX_USER)
    prompt_cache_key: str | None = Field(default=None, max_length=MAX_USER)
    client_metadata: Texts | None = Field(default=None, max_length=MAX_METADATA)

    @field_validator("input", mode="plain", json_schema_input_type=str | list[dict[str, Any]])
    @classmethod
    def _check_input(cls, value: Any) -> Any:
        if not isinstance(value, str | list):
            raise ValueError("must be a string or a list of items")  # noqa: TRY004 - as pydantic wants it
        return value

    @field_validator("client_metadata")
    @classmethod
    def _check_client_metadata(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        if sum(len(key) + len(each) for key, each in (value or {}).items()) > MAX_CLIENT_METADATA_LENGTH:
            raise ValueError(f"must have at most {MAX_CLIENT_METADATA_LENGTH} characters in its keys and values")
        return value


class _Chat(ChatRequest):
    """The chat that a response is. These fields of it have a place in the request's log line and no other effect."""

    unsupported: ClassVar[Unsupported] = {
        name: neutral for name, neutral in ChatRequest.unsupported.items() if name not in _NOTED
    }

    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    client_metadata: Texts | None = None

    def annotations(self) -> dict[str, Any]:
        return {**super().annotations(), **self.model_dump(include=set(_NOTED), exclude_none=True)}


class _CutChat(_Chat):
    """One whose oldest turns are dropped where the context has no room for them."""

    drops_oldest: ClassVar[bool] = True


def asked_by(raw: Any) -> Asked:
    """What a body, parsed, asks for. Raises InvalidRequest."""
    own, passed = parted(raw, ResponseRequest, _UNSUPPORTED, _PASSED)
    body = valid(ResponseRequest, own)
    text = _of_object(TextOptions, body.text, _TEXT, "text")
    reasoning = _of_object(ReasoningOptions, body.reasoning, _REASONING, "reasoning")
    if text.format is not None:
        check_goes_with(text.format, _FORMAT, "text.format")
    tools = offered(body.tools)
    chat = chat_of(body.input, body.instructions)
    choice, callable_tools = chosen(body.tool_choice, tools)
    has_logprobs = bool(body.top_logprobs) or "message.output_text.logprobs" in body.include
    names = {**chat.names, **{f"tools[{at}].function": tool.place for at, tool in enumerate(callable_tools)}, **_NAMES}
    try:
        ours = checked(
            _CutChat if body.truncation == "auto" else _Chat,
            {
                **passed,
                "messages": chat.messages,
                "max_tokens": body.max_output_tokens,
                "tools": [tool.for_chat() for tool in callable_tools],
                "tool_choice": choice,
                "response_format": None if text.format is None else _response_format(text.format),
                "reasoning_effort": reasoning.effort,
                "logprobs": has_logprobs,
                "top_logprobs": body.top_logprobs,
                "store": None if body.store is None else False,
                **body.model_dump(include=set(_NOTED)),
            },
        )
    except InvalidRequest as error:
        raise renamed(error, names) from None
    told = Told(
        echoed=_echoed(body, ours, text, reasoning),
        namespaces={tool.name: (tool.namespace, tool.function.name) for tool in tools if tool.namespace is not None},
        has_summary=(reasoning.summary or reasoning.generate_summary) is not None,
        has_sealed="reasoning.encrypted_content" in body.include,
    )
    return Asked(ours, lambda run: ResponseAnswer(run, ours, told), names=names, stream=TypedEventStream)


def _of_object(schema: Any, raw: dict[str, Any], unsupported: Unsupported, name: str) -> Any:
    kept = wanted(raw, schema.model_fields, unsupported, where=f"{name}.")
    if isinstance(kept.get("format"), dict):
        kept["format"] = {key: value for key, value in kept["format"].items() if value is not None}
    return valid(schema, kept, name)


# what is echoed


def _response_format(form: Format) -> dict[str, Any]:
    described = form.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
    return {"type": form.type, **({"json_schema": described} if form.type == "json_schema" else {})}


def _echoed(body: ResponseRequest, chat: ChatRequest, text: TextOptions, reasoning: ReasoningOptions) -> dict[str, Any]:
    """What an answer repeats of its request."""
    form = {"type": "text"} if text.format is None else text.format.model_dump(by_alias=True, exclude_none=True)
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": chat.metadata or {},
        "parallel_tool_calls": chat.parallel_tool_calls,
        "previous_response_id": None,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary or reasoning.generate_summary},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": False,
        "text": {"format": form},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools,
        "top_logprobs": body.top_logprobs or 0,
        "truncation": body.truncation or "disabled",
        "user": chat.user,
    }


# the route

router = APIRouter(tags=["inference"])


@router.post("/v1/responses", openapi_extra=documented("ResponseRequest"))
async def create_response(request: Request, caller: Caller, services: ServicesDep) -> Response:
    """Answer messages, with tools and thoughts: OpenAI's responses, of which none is stored."""
    return await answered(request, caller, services, lambda data: asked_by(parse_json(data)))
