"""`/v1/responses`: OpenAI's responses, without a memory. A body becomes a chat of this server's own.

Nothing is stored: what a conversation was so far is sent with each request, and whatever would be looked up later, or
run by the server itself, is refused by name.
"""

from typing import Any, ClassVar, Final, Literal

from fastapi import APIRouter, Request
from pydantic import Field, field_validator
from starlette.responses import Response

from manylora.api.auth import Caller
from manylora.api.fields import NOTHING, Unsupported, renamed, wanted
from manylora.api.json_body import documented, parse_json
from manylora.api.response_answers import ResponseAnswer, Told
from manylora.api.response_items import Chat, chat_of
from manylora.api.run import Asked, answered
from manylora.api.schemas import MAX_METADATA, MAX_USER, ChatRequest, Int, ReasoningEffort, checked
from manylora.api.sse import TypedEventStream
from manylora.api.state import ServicesDep
from manylora.api.tools import MAX_TOOLS
from manylora.api.translation import EXTENSIONS, Strict, documents, parted, valid
from manylora.errors import InvalidRequest, quoted

__all__ = ["ResponseRequest", "router"]

MAX_CLIENT_METADATA_VALUE: Final = 4096

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
_TOOL: Final[Unsupported] = {
    "allowed_callers": (["direct"], *NOTHING),
    "async": NOTHING,
    "defer_loading": NOTHING,
    "output_schema": NOTHING,
}
_NOTED: Final = ("safety_identifier", "prompt_cache_key", "client_metadata")
# What a chat calls each field, and what it is called here.
_NAMES: Final = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}


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


class FunctionTool(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(default=None, description="Whether arguments are held to the schema; only if true.")


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
    include: list[Literal["reasoning.encrypted_content", "message.output_text.logprobs"]] = Field(default=[])
    top_logprobs: Int | None = Field(default=None, ge=0)
    truncation: Literal["auto", "disabled"] | None = Field(default=None, description="`auto`: old turns are dropped.")
    store: bool | None = Field(default=None, description="Nothing is stored in any case.")
    safety_identifier: str | None = Field(default=None, max_length=MAX_USER)
    prompt_cache_key: str | None = Field(default=None, max_length=MAX_USER)
    client_metadata: dict[str, str] | None = Field(default=None, max_length=MAX_METADATA)

    @field_validator("input", mode="plain", json_schema_input_type=str | list[dict[str, Any]])
    @classmethod
    def _check_input(cls, value: Any) -> Any:
        if not isinstance(value, str | list):
            raise ValueError("must be a string or a list of items")  # noqa: TRY004 - as pydantic wants it
        return value

    @field_validator("client_metadata")
    @classmethod
    def _check_client_metadata(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        if any(len(each) > MAX_CLIENT_METADATA_VALUE for pair in (value or {}).items() for each in pair):
            raise ValueError(f"must have keys and values of at most {MAX_CLIENT_METADATA_VALUE} characters")
        return value


class _Chat(ChatRequest):
    """The chat that a response is. These fields of it have a place in the request's log line and no other effect."""

    unsupported: ClassVar[Unsupported] = {
        name: neutral for name, neutral in ChatRequest.unsupported.items() if name not in _NOTED
    }

    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    client_metadata: dict[str, str] | None = None

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
    tools = [_tool(tool, number) for number, tool in enumerate(body.tools)]
    chat = chat_of(body.input, body.instructions)
    choice, offered = _choice(body.tool_choice, tools)
    has_logprobs = bool(body.top_logprobs) or "message.output_text.logprobs" in body.include
    names = _names(chat, offered)
    try:
        ours = checked(
            _CutChat if body.truncation == "auto" else _Chat,
            {
                **passed,
                "messages": chat.messages,
                "max_tokens": body.max_output_tokens,
                "tools": [_function(tools[number]) for number in offered],
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
        echoed=_echoed(body, ours, tools, text, reasoning),
        has_summary=(reasoning.summary or reasoning.generate_summary) is not None,
        has_sealed="reasoning.encrypted_content" in body.include,
    )
    return Asked(ours, lambda run: ResponseAnswer(run, ours, told), names=names, stream=TypedEventStream)


def _of_object(schema: Any, raw: dict[str, Any], unsupported: Unsupported, name: str) -> Any:
    kept = wanted(raw, schema.model_fields, unsupported, where=f"{name}.")
    if isinstance(kept.get("format"), dict):
        kept["format"] = {key: value for key, value in kept["format"].items() if value is not None}
    return valid(schema, kept, name)


def _names(chat: Chat, offered: list[int]) -> dict[str, str]:
    """What a chat's fields are called here. `offered` are the numbers of the tools that may be called."""
    tools = {f"tools[{number}].function": f"tools[{own}]" for number, own in enumerate(offered)}
    return {**chat.names, **tools, **_NAMES}


# tools


def _tool(raw: dict[str, Any], number: int) -> FunctionTool:
    place = f"tools[{number}]"
    kind = raw.get("type")
    if kind != "function":
        raise InvalidRequest(
            f"'{place}' is of the type '{quoted(str(kind))}', which is not supported: this server runs no tools of its "
            "own. Send functions, and leave this one out.",
            param=f"{place}.type",
        )
    return valid(FunctionTool, wanted(raw, FunctionTool.model_fields, _TOOL, where=f"{place}."), "tools", number)


def _function(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _choice(value: Any, tools: list[FunctionTool]) -> tuple[Any, list[int]]:
    """A chat's `tool_choice`, and the numbers of the tools that may be called. Raises InvalidRequest."""
    every = list(range(len(tools)))
    if isinstance(value, dict):
        if value.get("type") == "function" and set(value) == {"type", "name"} and isinstance(value["name"], str):
            return {"type": "function", "function": {"name": value["name"]}}, every
        allowed = _allowed(value.get("tools"))
        is_mode = value.get("mode") in ("auto", "required") and set(value) == {"type", "mode", "tools"}
        if value.get("type") == "allowed_tools" and is_mode and allowed:
            names = {tool.name for tool in tools}
            missing = next((name for name in allowed if name not in names), None)
            if missing is not None:
                raise InvalidRequest(
                    f"'tool_choice' allows '{quoted(missing)}', which is not among 'tools'.", param="tool_choice"
                )
            return value["mode"], [number for number in every if tools[number].name in allowed]
    elif value in (None, "none", "auto", "required"):
        return value, every
    raise InvalidRequest(
        '\'tool_choice\' must be "none", "auto", "required", {"type": "function", "name": …} or {"type": '
        '"allowed_tools", "mode": "auto" or "required", "tools": [{"type": "function", "name": …}]}.',
        param="tool_choice",
    )


def _allowed(value: Any) -> list[str]:
    """The names in a list of functions; none where it is anything else."""
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        return []
    functions = [each for each in value if isinstance(each, dict) and each.get("type") == "function"]
    names = [name for each in functions if isinstance(name := each.get("name"), str)]
    return names if len(names) == len(value) else []


# what is echoed


def _response_format(form: Format) -> dict[str, Any]:
    described = form.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
    return {"type": form.type, **({"json_schema": described} if form.type == "json_schema" else {})}


def _echoed(
    body: ResponseRequest, chat: ChatRequest, tools: list[FunctionTool], text: TextOptions, reasoning: ReasoningOptions
) -> dict[str, Any]:
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
        "tools": [tool.model_dump() for tool in tools],
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
