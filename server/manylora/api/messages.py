"""One message of a chat as it arrives: its shape, and what it asks for once what says nothing is left out."""

from typing import Any, Final, Literal

from pydantic import Field, ValidationInfo, field_validator

from manylora.api.fields import MESSAGE_UNSUPPORTED, PART_UNSUPPORTED, asks_for_nothing, wanted
from manylora.api.strict import Strict
from manylora.api.tools import MAX_TOOL_CALLS, ToolCall
from manylora.errors import InvalidRequest, UnsupportedField, quoted

__all__ = ["Message", "cleaned_message"]

MAX_NAME: Final = 256


class Message(Strict):
    """One message of a chat. `name`, `tool_call_id`, `tool_calls` and reasoning go to the model's chat template.

    `cache_control` is a hint for servers that keep prompts only when told to. Here every prompt's blocks are kept.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str = Field(default="", description="Required but for the assistant's.")
    refusal: str | None = Field(default=None, description="What the assistant said in place of `content`.")
    name: str | None = Field(default=None, max_length=MAX_NAME)
    tool_call_id: str | None = Field(default=None, max_length=MAX_NAME)
    tool_calls: list[ToolCall] = Field(
        default=[], max_length=MAX_TOOL_CALLS, fail_fast=True, description="What the assistant called."
    )
    reasoning_content: str | None = Field(default=None, description="What the assistant thought before `content`.")
    reasoning: str | None = Field(default=None, description="Another name of it.")
    cache_control: dict[str, Any] | None = None

    @field_validator("content", mode="plain", json_schema_input_type=str | list[dict[str, str]])
    @classmethod
    def _join_parts(cls, value: Any, info: ValidationInfo) -> str:
        if isinstance(value, str):
            return value
        if not isinstance(value, list) or not value:
            raise ValueError("must be a string or a list of text parts, and not empty")
        is_answer = info.data.get("role") == "assistant"
        return "".join(_text_of(part, number, is_answer) for number, part in enumerate(value))

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it; the newer role `developer` is what templates call `system`."""
        role = "system" if self.role == "developer" else self.role
        more: dict[str, Any] = {"name": self.name, "tool_call_id": self.tool_call_id}
        if self.tool_calls:
            more["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.role == "assistant":
            more["reasoning_content"] = self.reasoning_content or self.reasoning
        content = self.content or self.refusal or ""
        return {"role": role, "content": content, **{name: value for name, value in more.items() if value is not None}}


# What a part may have besides its type and its text: hints for servers that keep prompts only when told to.
_PART_HINTS: Final = frozenset({"cache_control", "prompt_cache_breakpoint"})


def _text_of(part: object, number: int, is_answer: bool) -> str:
    """The text of a text part, and in an answer of a refusal. Raises ValueError with what is wrong."""
    if not isinstance(part, dict):
        raise ValueError(f"has a part {number} that is no object")  # noqa: TRY004 - as pydantic wants it
    kind = part.get("type")
    if kind != "text" and not (kind == "refusal" and is_answer):
        raise ValueError(f"has a part {number} of the type '{quoted(str(kind))}': only text parts are supported")
    try:
        kept = wanted(part, {"type", kind, *_PART_HINTS}, PART_UNSUPPORTED)
    except UnsupportedField as error:
        raise ValueError(f"has a part {number} with the field '{error.param}', which is not supported") from None
    text = kept.get(kind)
    if not isinstance(text, str):
        raise ValueError(f"has a part {number} whose '{kind}' is no string")  # noqa: TRY004 - as pydantic wants it
    return text


def cleaned_message(message: dict[str, Any], where: str) -> dict[str, Any]:
    """What is asked for, without nulls and neutral values. Raises InvalidRequest with the place, below `where`."""
    kept = wanted(message, Message.model_fields, MESSAGE_UNSUPPORTED, where=f"{where}.")
    is_answer = kept.get("role") == "assistant"
    if "content" not in kept and not is_answer:
        field = f"{where}.content"
        if "content" in message:
            raise InvalidRequest(f"'{field}' is null. Only an assistant's message may be without text.", param=field)
        raise InvalidRequest(f"The field '{field}' is required.", param=field)
    for name in ("tool_calls", "reasoning", "reasoning_content"):
        if name in kept and asks_for_nothing(kept[name]):
            del kept[name]
    if "tool_calls" in kept and not is_answer:
        field = f"{where}.tool_calls"
        raise InvalidRequest(f"'{field}' is only in an assistant's message. Leave it out.", param=field)
    if isinstance(kept.get("tool_calls"), list):
        kept["tool_calls"] = [_without_nulls(call) for call in kept["tool_calls"]]
    if kept.get("refusal") == "":
        del kept["refusal"]
    if "refusal" in kept and (kept.get("content") or not is_answer):
        field = f"{where}.refusal"
        raise InvalidRequest(
            f"'{field}' is what an assistant said in place of 'content'. Send one of the two.", param=field
        )
    return kept


def _without_nulls(value: Any) -> Any:
    return {key: inner for key, inner in value.items() if inner is not None} if isinstance(value, dict) else value
