"""`/v1/messages` and `/v1/messages/count_tokens`: Anthropic's protocol. A body becomes a chat of this server's own."""

from functools import partial
from typing import Annotated, Any, ClassVar, Final, Literal

import orjson
from fastapi import APIRouter, Depends, Query, Request
from pydantic import Field, field_validator
from starlette.responses import Response

from manylora.api.anthropic_answers import MessageAnswer, MessageStream
from manylora.api.anthropic_turns import turns_of
from manylora.api.auth import Caller
from manylora.api.defaults import with_defaults
from manylora.api.fields import NOTHING, Unsupported, renamed, wanted
from manylora.api.json_body import documented, parse_json
from manylora.api.kinds import check_kind
from manylora.api.naming import Named, adapter_of, looked_up
from manylora.api.requests import num_chat_tokens, read_body
from manylora.api.room import Seen
from manylora.api.run import Asked, answered
from manylora.api.schemas import ChatRequest, Int, checked
from manylora.api.state import ServicesDep
from manylora.api.strict import Strict
from manylora.api.tools import MAX_TOOLS
from manylora.api.translation import EXTENSIONS, documents, parted, valid
from manylora.errors import InvalidRequest, quoted
from manylora.identity import Mix

__all__ = ["CountRequest", "MessagesRequest", "router"]

# What goes on to a chat under its own name.
_PASSED: Final = ("model", "stream", "temperature", "top_p", *EXTENSIONS)
_COUNTED: Final = ("model", "adapter_id", "chat_template_kwargs", "documents", "add_special_tokens")
_UNSUPPORTED: Final[Unsupported] = {
    "container": NOTHING,
    "context_management": ({"edits": []}, {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}, *NOTHING),
    "diagnostics": NOTHING,
    "inference_geo": NOTHING,
    "mcp_servers": NOTHING,
    "speed": ("standard", *NOTHING),
    "user_profile_id": NOTHING,
    "workspace_id": NOTHING,
}
_TOOL: Final[Unsupported] = {
    "allowed_callers": (["direct"], *NOTHING),
    "defer_loading": NOTHING,
    "eager_input_streaming": (True, *NOTHING),  # arguments come while they are written
    "input_examples": NOTHING,
}
# What a chat calls each field, and what it is called here.
_NAMES: Final = {
    "stop": "stop_sequences",
    "response_format.json_schema": "output_config.format",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "user": "metadata.user_id",
}
_TIERS: Final = {None: None, "auto": "auto", "standard_only": "default"}
# How much a base is to think, for templates that read no number of tokens: the effort of budgets up to so many.
_EFFORTS: Final = ((1024, "low"), (4096, "medium"))
_ORDER: Final = ("low", "medium", "high", "xhigh", "max")


class ClientTool(Strict):
    """A tool that the client runs."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: dict[str, Any] | None = None


class Choice(Strict):
    """`tool_choice`."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Strict):
    """`thinking`."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Int | None = Field(default=None, ge=1)
    display: Literal["summarized", "omitted"] | None = None

    @property
    def effort(self) -> str | None:
        if self.budget_tokens is None:
            return None
        return next((effort for most, effort in _EFFORTS if self.budget_tokens <= most), "high")


class Format(Strict):
    """`output_config.format`."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class Output(Strict):
    """`output_config`."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None, description="With `thinking.budget_tokens` the lower of the two."
    )
    format: Format | None = None


class Metadata(Strict):
    """`metadata`."""

    user_id: str | None = None


class CountRequest(Strict):
    """`POST /v1/messages/count_tokens`."""

    model_config = documents(*_COUNTED)

    messages: list[Any]
    system: str | list[Any] | None = Field(default=None, description="Text, or blocks of text.")
    tools: list[dict[str, Any]] = Field(default=[], max_length=MAX_TOOLS, fail_fast=True)
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: Output | None = None
    cache_control: dict[str, Any] | None = Field(default=None, description="A hint; every prompt is cached.")

    @field_validator("system", mode="plain", json_schema_input_type=str | list[dict[str, Any]] | None)
    @classmethod
    def _check_system(cls, value: Any) -> Any:
        if not isinstance(value, str | list):
            raise ValueError("must be a string or a list of blocks")  # noqa: TRY004 - as pydantic wants it
        return value


class MessagesRequest(CountRequest):
    """`POST /v1/messages`."""

    model_config = documents(*_PASSED)

    max_tokens: Int = Field(ge=1, description="Where the context has room for fewer, the answer ends with it.")
    stop_sequences: list[str] = Field(default=[], fail_fast=True)
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None


class _Chat(ChatRequest):
    """A chat whose answer may fill the context, however many tokens are asked for."""

    may_fill_context: ClassVar[bool] = True


def _asked_by(data: bytes) -> Asked:
    """What a body asks for. Raises InvalidRequest."""
    own, passed = parted(parse_json(data), MessagesRequest, _UNSUPPORTED, _PASSED)
    body = valid(MessagesRequest, _without_nulls(own))
    chat, names = _chat_of(
        body,
        {
            **passed,
            "max_tokens": body.max_tokens,
            "stop": body.stop_sequences or None,
            "user": None if body.metadata is None else body.metadata.user_id,
            "service_tier": _TIERS[body.service_tier],
        },
    )
    return Asked(chat, lambda run: MessageAnswer(run, chat), names=names, stream=MessageStream)


def _counted_by(data: bytes) -> tuple[ChatRequest, dict[str, str]]:
    """The chat whose tokens are to be counted, and what its fields are called here. Raises InvalidRequest."""
    own, passed = parted(parse_json(data), CountRequest, _UNSUPPORTED, _COUNTED)
    return _chat_of(valid(CountRequest, _without_nulls(own)), passed)


def _without_nulls(own: dict[str, Any]) -> dict[str, Any]:
    return {name: _kept(value) if name in ("tool_choice", "thinking", "output_config", "metadata") else value
            for name, value in own.items()}  # fmt: skip


def _kept(value: Any) -> Any:
    return {key: each for key, each in value.items() if each is not None} if isinstance(value, dict) else value


def _chat_of(body: CountRequest, more: dict[str, Any]) -> tuple[ChatRequest, dict[str, str]]:
    turns = turns_of(body.messages, body.system)
    tools = [_tool(tool, number) for number, tool in enumerate(body.tools)]
    names = {**turns.names, **_names_of_tools(len(tools)), **_NAMES}
    output = body.output_config or Output()
    try:
        chat = checked(
            _Chat,
            {
                **_thinking(body.thinking, output.effort, more),
                **more,
                "messages": turns.messages,
                "continue_final_message": turns.is_begun,
                "tools": tools,
                "tool_choice": _choice(body.tool_choice),
                "parallel_tool_calls": body.tool_choice is None or not body.tool_choice.disable_parallel_tool_use,
                "response_format": None if output.format is None else _response_format(output.format),
            },
        )
    except InvalidRequest as error:
        raise renamed(error, names) from None
    return chat, names


def _names_of_tools(num_tools: int) -> dict[str, str]:
    names: dict[str, str] = {}
    for number in range(num_tools):
        place = f"tools[{number}]"
        names |= {f"{place}.function.parameters": f"{place}.input_schema", f"{place}.function": place}
    return names


def _tool(raw: dict[str, Any], number: int) -> dict[str, Any]:
    place = f"tools[{number}]"
    kind = raw.get("type")
    if kind not in (None, "custom"):
        raise InvalidRequest(
            f"'{place}' is of the type '{quoted(str(kind))}', which is not supported: tools here are the client's own, "
            "with an 'input_schema'. Leave this one out.",
            param=f"{place}.type",
        )
    tool = valid(ClientTool, wanted(raw, ClientTool.model_fields, _TOOL, where=f"{place}."), "tools", number)
    described = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": {**described, "strict": tool.strict}}


def _choice(choice: Choice | None) -> Any:
    """A chat's `tool_choice`. Raises InvalidRequest."""
    if choice is None:
        return None
    if (choice.name is not None) != (choice.type == "tool"):
        raise InvalidRequest("'tool_choice.name' goes with the type 'tool'.", param="tool_choice.name")
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    return "required" if choice.type == "any" else choice.type


def _thinking(thinking: Thinking | None, effort: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Whether a base thinks, as far as its template asks, how much, and whether the answer shows it."""
    told = {"include_reasoning": False, "reasoning_effort": effort}
    if thinking is None:
        return told
    is_on = thinking.type != "disabled"
    if (thinking.budget_tokens is not None) != (thinking.type == "enabled"):
        raise InvalidRequest(
            "'thinking.budget_tokens' goes with the type 'enabled', and that with it.", param="thinking.budget_tokens"
        )
    if thinking.display is not None and not is_on:
        raise InvalidRequest("'thinking.display' does not go with the type 'disabled'.", param="thinking.display")
    variables = given.get("chat_template_kwargs")
    if variables is None or isinstance(variables, dict):
        told_so = (variables or {}).get("enable_thinking")
        if told_so is not None and told_so is not is_on:
            where = "chat_template_kwargs.enable_thinking"
            raise InvalidRequest(f"'{where}' and 'thinking' differ. Send one.", param=where)
        given["chat_template_kwargs"] = {**(variables or {}), "enable_thinking": is_on}
    # Each of the two is the most that is asked for.
    efforts = [each for each in (effort, thinking.effort) if each is not None]
    told["reasoning_effort"] = min(efforts, key=_ORDER.index, default=None)
    return {**told, "include_reasoning": is_on and thinking.display != "omitted"}


def _response_format(form: Format) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": form.schema_}}


# routes


async def _takes_beta(beta: Annotated[Literal["true"] | None, Query()] = None) -> None:
    """Anthropic's clients ask so for fields that are in beta. Which fields there are is the same with it."""


router = APIRouter(tags=["Anthropic"], dependencies=[Depends(_takes_beta)])


@router.post("/v1/messages", openapi_extra=documented("MessagesRequest"))
async def create_message(request: Request, caller: Caller, services: ServicesDep) -> Response:
    """Answer messages, with tools and thoughts."""
    return await answered(request, caller, services, _asked_by)


@router.post("/v1/messages/count_tokens", openapi_extra=documented("CountRequest"))
async def count_tokens(request: Request, caller: Caller, services: ServicesDep) -> Response:
    """How many tokens the prompt of such messages has. It is no usage."""
    body, names = await read_body(request, _counted_by)
    check_kind(body, services.engine.model)
    base, aliases = services.engine.model.name, services.settings.resolved_model_aliases
    find = partial(adapter_of, body, services.directory, caller.tenant, base, aliases)
    adapter = await looked_up(find, services.following)
    try:
        completed, _ = with_defaults(body, services.directory, Named(adapter))
        assert isinstance(completed, ChatRequest), "it is the same body with more fields"
        seen = Seen.by(Mix.of(adapter), services.engine)
        count = await num_chat_tokens(completed, seen, caller.tenant)
    except InvalidRequest as error:
        raise renamed(error, names) from None
    return Response(orjson.dumps({"input_tokens": count}), media_type="application/json")
