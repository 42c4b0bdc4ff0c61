"""Tools of a response: functions, also those that stand in a namespace, and which of them may be called.

A chat knows no namespaces, so that a function of one is told to the model as `<namespace>.<function>`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from pydantic import Field, ValidationError

from manylora.api.fields import NOTHING, Unsupported, wanted
from manylora.api.strict import Strict
from manylora.api.tools import MAX_TOOLS
from manylora.api.translation import valid
from manylora.errors import InvalidRequest, quoted

__all__ = ["Offered", "chosen", "offered", "told_as"]

_TOOL: Final[Unsupported] = {
    "allowed_callers": (["direct"], *NOTHING),
    "async": NOTHING,
    "defer_loading": NOTHING,
    "output_schema": NOTHING,
}


class FunctionTool(Strict):
    """A function that the model may call. Its arguments are held to the schema only where `strict` is true."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamespaceTool(Strict):
    """Functions that belong together; the model is told of them together."""

    type: Literal["namespace"]
    name: str = Field(min_length=1)
    description: str | None = None
    tools: list[dict[str, Any]] = Field(max_length=MAX_TOOLS, fail_fast=True)


class NamedFunction(Strict):
    """A function that `tool_choice` names."""

    type: Literal["function"]
    name: str
    namespace: str | None = None

    @property
    def told(self) -> str:
        """What the model calls it."""
        return told_as(self.name, self.namespace)


class AllowedTools(Strict):
    """`tool_choice` of several functions, which are then all that the model is told of."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedFunction] = Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)


@dataclass(frozen=True, slots=True)
class Offered:
    """A function with its place in the body, and what is told of its namespace with it."""

    function: FunctionTool
    place: str
    namespace: str | None = None
    introduction: str | None = None

    @property
    def name(self) -> str:
        """What the model calls it."""
        return told_as(self.function.name, self.namespace)

    def for_chat(self) -> dict[str, Any]:
        described = self.function.model_dump(exclude={"type"}, exclude_none=True)
        description = "\n\n".join(part for part in (self.introduction, self.function.description) if part)
        return {"type": "function", "function": {**described, "name": self.name, "description": description}}


def told_as(name: str, namespace: str | None) -> str:
    """What the model calls a function."""
    return name if namespace is None else f"{namespace}.{name}"


def offered(tools: Sequence[dict[str, Any]]) -> list[Offered]:
    """The functions in `tools`. Raises InvalidRequest with the place of the first at fault."""
    found: list[Offered] = []
    for number, raw in enumerate(tools):
        place = f"tools[{number}]"
        if raw.get("type") != "namespace":
            found.append(Offered(_function(raw, place, ("function", "namespace")), place))
            continue
        space = valid(NamespaceTool, wanted(raw, NamespaceTool.model_fields, {}, where=f"{place}."), place)
        for at, inner in enumerate(space.tools):
            where = f"{place}.tools[{at}]"
            introduction = None if at else space.description
            found.append(Offered(_function(inner, where, ("function",)), where, space.name, introduction))
    return found


def _function(raw: dict[str, Any], place: str, kinds: tuple[str, ...]) -> FunctionTool:
    kind = raw.get("type")
    if kind != "function":
        raise InvalidRequest(
            f"'{place}' is of the type '{quoted(str(kind))}', which is not supported: this server runs no tools of its "
            f"own. Send {' and '.join(f'{each}s' for each in kinds)}, and leave this one out.",
            param=f"{place}.type",
        )
    return valid(FunctionTool, wanted(raw, FunctionTool.model_fields, _TOOL, where=f"{place}."), place)


def chosen(value: Any, tools: Sequence[Offered]) -> tuple[Any, list[Offered]]:
    """A chat's `tool_choice`, and the tools that may be called. Raises InvalidRequest."""
    if value in (None, "none", "auto", "required"):
        return value, list(tools)
    choice = _choice(value)
    named = [choice] if isinstance(choice, NamedFunction) else choice.tools
    names = {tool.name for tool in tools}
    missing = next((each.told for each in named if each.told not in names), None)
    if missing is not None:
        raise InvalidRequest(
            f"'tool_choice' names '{quoted(missing)}', which is not among 'tools'.", param="tool_choice"
        )
    if isinstance(choice, NamedFunction):
        return {"type": "function", "function": {"name": choice.told}}, list(tools)
    allowed = {each.told for each in named}
    return choice.mode, [tool for tool in tools if tool.name in allowed]


def _choice(value: Any) -> NamedFunction | AllowedTools:
    kind = value.get("type") if isinstance(value, dict) else None
    try:
        return (NamedFunction if kind == "function" else AllowedTools).model_validate(value)
    except ValidationError:
        raise InvalidRequest(
            '\'tool_choice\' must be "none", "auto", "required", {"type": "function", "name": …} or {"type": '
            '"allowed_tools", "mode": "auto" or "required", "tools": [{"type": "function", "name": …}]}, where a '
            "function of a namespace has that as 'namespace' beside its name.",
            param="tool_choice",
        ) from None
