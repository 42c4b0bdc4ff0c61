"""Tools as OpenAI describes them: what is offered, what may and must be called, what was called in earlier turns."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

import orjson
from pydantic import BeforeValidator, Field, field_validator

from manylora.api.strict import Strict
from manylora.chat.holding import CallRules, HeldTool
from manylora.errors import InvalidRequest, quoted

__all__ = ["MAX_TOOLS", "CalledFunction", "NamedTool", "Tool", "ToolCall", "ToolChoice", "Tools"]

MAX_TOOLS: Final = 128
MAX_TOOL_CALLS: Final = 256
MAX_TOOLS_BYTES: Final = 1_048_576
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Function(Strict):
    """A function that the model may call. With `strict` its arguments follow the schema, whatever the model likes."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="A JSON schema; none: no arguments.")
    strict: bool | None = None

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError("must be 1 to 64 letters, digits, '_', '-' and '.'")
        return value

    @field_validator("parameters")
    @classmethod
    def _check_parameters(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value and value.get("type", "object") != "object":
            raise ValueError("must be the schema of an object, of the type 'object'")
        return value

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        if self.parameters:
            return self.parameters
        return {"type": "object", "properties": {}, "additionalProperties": False}


class Tool(Strict):
    """One of `tools`."""

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        function: dict[str, Any] = {"name": self.function.name, "description": self.function.description or ""}
        function["parameters"] = self.function.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


class FunctionName(Strict):
    """`function` of a choice."""

    name: str


class NamedTool(Strict):
    """`tool_choice` of one function. Clients of TGI leave the type out."""

    type: Literal["function"] = "function"
    function: FunctionName


def _choice(value: Any) -> Any:
    if value in ("none", "auto", "required"):
        return value
    if (
        isinstance(value, dict)
        and isinstance(value.get("function"), dict)
        and value.get("type", "function") == "function"
    ):
        return NamedTool.model_validate(value)
    raise ValueError('must be "none", "auto", "required" or {"type": "function", "function": {"name": …}}')


ToolChoice = Annotated[Literal["none", "auto", "required"] | NamedTool, BeforeValidator(_choice)]


class CalledFunction(Strict):
    """What was called; `arguments` come as JSON in a string and go on as an object."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: dict[str, Any] = Field(default_factory=dict)

    @field_validator("arguments", mode="plain", json_schema_input_type=str)
    @classmethod
    def _parse(cls, value: Any) -> dict[str, Any]:
        if isinstance(value, str):
            try:
                value = orjson.loads(value or "{}")
            except orjson.JSONDecodeError as error:
                raise ValueError(f"is no valid JSON: {error}") from None
        if not isinstance(value, dict):
            raise ValueError("must be a JSON object, as a string")  # noqa: TRY004 - as pydantic wants it
        return value


class ToolCall(Strict):
    """A call of an earlier turn. Clients that put a stream together leave its `index` in."""

    id: Annotated[str, Field(max_length=256)] = ""
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None

    def for_template(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": self.function.model_dump()}


class Tools:
    """What a request offers, and what it asks for with it. Raises InvalidRequest where the two do not fit."""

    def __init__(self, tools: Sequence[Tool], choice: ToolChoice | None, *, parallel: bool) -> None:
        names = [tool.function.name for tool in tools]
        twice = next((number for number, name in enumerate(names) if name in names[:number]), None)
        if twice is not None:
            where = f"tools[{twice}].function.name"
            raise InvalidRequest(f"'{where}' is the name of an earlier tool, too. Name each once.", param=where)
        if not tools and choice not in (None, "auto", "none"):
            raise InvalidRequest("'tool_choice' asks for a call, and 'tools' has none. Send both.", param="tool_choice")
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise InvalidRequest(
                f"'tool_choice' names '{quoted(choice.function.name)}', which is not among 'tools'.",
                param="tool_choice",
            )
        self.must_call = choice == "required" or isinstance(choice, NamedTool)
        self.named = choice.function.name if isinstance(choice, NamedTool) else None
        self.only_one = not parallel or self.named is not None
        self.offered = () if choice == "none" else tuple(tools)

    @property
    def names(self) -> tuple[str, ...]:
        """Of those that may be called."""
        return tuple(tool.function.name for tool in self.offered)

    @property
    def schemas(self) -> dict[str, dict[str, Any]]:
        """Of their arguments, by name."""
        return {tool.function.name: tool.function.schema_of_arguments for tool in self.offered}

    @property
    def are_held(self) -> bool:
        """Whether the answer is held to a grammar."""
        return bool(self.offered) and (self.must_call or any(tool.function.strict for tool in self.offered))

    def for_template(self) -> list[dict[str, Any]]:
        """Raises InvalidRequest where they are too much."""
        described = [tool.for_template() for tool in self.offered]
        if len(orjson.dumps(described)) > MAX_TOOLS_BYTES:
            raise InvalidRequest(f"'tools' take more than {MAX_TOOLS_BYTES} bytes. Send fewer.", param="tools")
        return described

    def rules(self, text_schema: str | None) -> CallRules:
        """What the grammar must see to; `text_schema` is what an answer without a call looks like."""
        held = [
            HeldTool(tool.function.name, tool.function.schema_of_arguments, not tool.function.strict)
            for tool in self.offered
            if self.named in (None, tool.function.name)
        ]
        return CallRules(held, must_call=self.must_call, only_one=self.only_one, text_schema=text_schema)
