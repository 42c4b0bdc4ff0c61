"""The items of a response's input become the messages of a chat.

What one turn of the assistant was, its thoughts, what it said and what it called, is several items here and one message
there. Items that begin the input with instructions are joined, since many chat templates take them once.
"""

import base64
import binascii
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationInfo, field_validator

from manylora.api.fields import NOTHING, Unsupported, asks_for_nothing, wanted
from manylora.api.messages import MAX_NAME
from manylora.api.response_tools import told_as
from manylora.api.schemas import MAX_MESSAGES
from manylora.api.strict import Strict
from manylora.api.tools import CalledFunction
from manylora.api.translation import valid
from manylora.errors import InvalidRequest, UnsupportedField, quoted

__all__ = ["Chat", "chat_of", "sealed"]

_SEAL: Final = "manylora."
# What a part may have besides its type and its text: hints for servers that keep prompts only when told to, and in an
# answer the log-probabilities that came with it.
_PART_HINTS: Final = frozenset({"prompt_cache_breakpoint"})
_ANSWERS_PART: Final[Unsupported] = {"annotations": NOTHING}
_PLAIN_PART: Final[Unsupported] = {"logprobs": NOTHING, **_ANSWERS_PART}
_MESSAGE: Final[Unsupported] = {"created_by": NOTHING}
_ITEM: Final[Unsupported] = {"phase": NOTHING, **_MESSAGE}
_CALL: Final[Unsupported] = {"caller": ({"type": "direct"}, *NOTHING), "async": NOTHING, **_ITEM}


def _content(value: Any, info: ValidationInfo) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")  # noqa: TRY004 - as pydantic wants it
    is_answer = info.data.get("role") == "assistant"
    return "".join(_text_of(part, number, is_answer) for number, part in enumerate(value))


def _text_of(part: object, number: int, is_answer: bool) -> str:
    """Raises ValueError with what is wrong."""
    if not isinstance(part, dict):
        raise ValueError(f"has a part {number} that is no object")  # noqa: TRY004 - as pydantic wants it
    kind = part.get("type")
    if kind not in ("input_text", "output_text", "text") and not (kind == "refusal" and is_answer):
        raise ValueError(f"has a part {number} of the type '{quoted(str(kind))}': only text parts are supported")
    name = "refusal" if kind == "refusal" else "text"
    has_logprobs = is_answer and kind == "output_text"
    known = {"type", name, *_PART_HINTS, *(("logprobs",) if has_logprobs else ())}
    try:
        wanted(part, known, _ANSWERS_PART if has_logprobs else _PLAIN_PART)
    except UnsupportedField as error:
        raise ValueError(f"has a part {number} with the field '{error.param}', which is not supported") from None
    text = part.get(name)
    if not isinstance(text, str):
        raise ValueError(f"has a part {number} whose '{name}' is no string")  # noqa: TRY004 - as pydantic wants it
    return text


class _Item(Strict):
    """What items of answers have, so that these can be sent back as they came."""

    id: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class MessageItem(_Item):
    """`type` may be left out.

    With `phase`, clients send back whether a message of the assistant's came between its calls or behind them. Where it
    stands among the items says the same, so that no template needs it.
    """

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str
    phase: Literal["commentary", "final_answer"] | None = None

    _check_content = field_validator("content", mode="plain")(_content)

    @field_validator("phase", mode="before")
    @classmethod
    def _check_phase(cls, value: Any, info: ValidationInfo) -> Any:
        if asks_for_nothing(value):
            return None
        if info.data.get("role") != "assistant":
            raise ValueError("goes with messages of the role 'assistant'. Leave it out")
        return value


class CallItem(_Item, CalledFunction):
    """What the assistant called."""

    type: Literal["function_call"]
    call_id: Annotated[str, Field(max_length=MAX_NAME)]
    namespace: Annotated[str, Field(min_length=1, max_length=MAX_NAME)] | None = None


class OutputItem(_Item):
    """What a call returned."""

    type: Literal["function_call_output"]
    call_id: Annotated[str, Field(max_length=MAX_NAME)]
    output: str
    name: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    namespace: Annotated[str, Field(min_length=1, max_length=MAX_NAME)] | None = None

    _check_output = field_validator("output", mode="plain")(_content)

    @field_validator("namespace")
    @classmethod
    def _check_namespace(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("name") is None:
            raise ValueError("goes with 'name'. Send both, or leave it out")
        return value


class ThoughtPart(Strict):
    """Some of what was thought."""

    type: Literal["summary_text", "reasoning_text"]
    text: str


class ReasoningItem(_Item):
    """What the assistant thought: the first that there is of `content`, `encrypted_content` and `summary`."""

    type: Literal["reasoning"]
    summary: list[ThoughtPart] = Field(default=[], fail_fast=True)
    content: list[ThoughtPart] = Field(default=[], fail_fast=True)
    encrypted_content: str | None = None

    @field_validator("encrypted_content")
    @classmethod
    def _check_seal(cls, value: str | None) -> str | None:
        if value is not None:
            _unsealed(value)
        return value

    @property
    def text(self) -> str:
        if self.content or self.encrypted_content is None:
            return "\n\n".join(part.text for part in self.content or self.summary)
        return _unsealed(self.encrypted_content)


def sealed(thoughts: str) -> str:
    """Thoughts as `encrypted_content`, so that clients which send back nothing else of them send them back.

    The client may read them anyway, and so there is nothing to hide: this is base64.
    """
    return _SEAL + base64.b64encode(thoughts.encode()).decode()


def _unsealed(text: str) -> str:
    """Raises ValueError."""
    try:
        if text.startswith(_SEAL):
            return base64.b64decode(text[len(_SEAL) :], validate=True).decode()
    except (binascii.Error, UnicodeError):
        pass
    raise ValueError("is not of this server, which cannot read it. Leave the item out")


@dataclass
class Chat:
    """The messages, and of each the place that it comes from, for errors about it."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    _instructions: list[str] = field(default_factory=list)  # of the first message, which are joined in the end
    _thoughts: list[str] = field(default_factory=list)
    _thoughts_place: str = ""

    def add(self, place: str, message: dict[str, Any]) -> None:
        if message["role"] != "assistant":
            self._end_thoughts()
        elif self._thoughts:
            message["reasoning_content"] = self._taken_thoughts()
        self.messages.append(message)
        self.places.append(place)

    def instruct(self, place: str, role: str, text: str) -> None:
        """Instructions: one message for all with which the chat begins."""
        if len(self.messages) == 1 and self._instructions and not self._thoughts:
            self._instructions.append(text)
            return
        self.add(place, {"role": role, "content": text})
        if len(self.messages) == 1:
            self._instructions.append(text)

    def think(self, place: str, text: str) -> None:
        """Thoughts, which belong to what the assistant says or calls next."""
        if not self._thoughts:
            self._thoughts_place = place
        if text:
            self._thoughts.append(text)

    def call(self, place: str, call: dict[str, Any]) -> None:
        """A call belongs to what the assistant has just said, unless it has thought since."""
        if self._thoughts or not self.messages or self.messages[-1]["role"] != "assistant":
            self.add(place, {"role": "assistant", "content": None})
        self.messages[-1].setdefault("tool_calls", []).append(call)

    def end(self) -> None:
        """All of it is there."""
        self._end_thoughts()
        if self._instructions:
            self.messages[0]["content"] = "\n\n".join(self._instructions)

    def _end_thoughts(self) -> None:
        """Thoughts that nothing was said after are a message of their own."""
        if self._thoughts:
            thoughts = self._taken_thoughts()
            self.messages.append({"role": "assistant", "content": "", "reasoning_content": thoughts})
            self.places.append(self._thoughts_place)

    def _taken_thoughts(self) -> str:
        thoughts = "\n\n".join(self._thoughts)
        self._thoughts.clear()
        return thoughts

    @property
    def names(self) -> dict[str, str]:
        """What the input calls each message."""
        return {f"messages[{number}]": place for number, place in enumerate(self.places)}


def chat_of(given: str | list[Any], instructions: str | None) -> Chat:
    """Raises InvalidRequest with the place of the first item at fault."""
    chat = Chat()
    if instructions:
        chat.instruct("instructions", "system", instructions)
    if isinstance(given, str):
        chat.add("input", {"role": "user", "content": given})
        chat.end()
        return chat
    if not given:
        raise InvalidRequest("'input' is empty. Send at least one item.", param="input")
    if len(given) > MAX_MESSAGES:
        raise InvalidRequest(
            f"'input' has {len(given)} items; at most {MAX_MESSAGES} are taken. Send less of the history.",
            param="input",
        )
    for number, item in enumerate(given):
        _add_item(chat, item, number)
    chat.end()
    return chat


def _add_item(chat: Chat, item: Any, number: int) -> None:
    place = f"input[{number}]"
    if not isinstance(item, dict):
        raise InvalidRequest(f"'{place}' must be an object.", param=place)
    kind = item.get("type", "message" if "role" in item else None)
    if not isinstance(kind, str) or kind not in _KINDS:
        why = _WHY_NOT.get(kind, "") if isinstance(kind, str) else ""
        raise InvalidRequest(
            f"'{place}' is of the type '{quoted(str(kind))}', which is not supported: send {', '.join(_KINDS)}.{why}",
            param=f"{place}.type",
        )
    schema, unsupported, add = _KINDS[kind]
    add(chat, place, valid(schema, wanted(item, schema.model_fields, unsupported, where=f"{place}."), "input", number))


_WHY_NOT: Final = {
    "item_reference": " Nothing is stored here: have your client send items whole, as many do with 'store': false."
}


def _add_message(chat: Chat, place: str, item: Any) -> None:
    if item.role in ("system", "developer"):
        chat.instruct(place, item.role, item.content)
    else:
        chat.add(place, {"role": item.role, "content": item.content})


def _add_call(chat: Chat, place: str, item: Any) -> None:
    function = {"name": told_as(item.name, item.namespace), "arguments": item.arguments}
    chat.call(place, {"id": item.call_id, "function": function})


def _add_output(chat: Chat, place: str, item: Any) -> None:
    name = None if item.name is None else told_as(item.name, item.namespace)
    chat.add(place, {"role": "tool", "tool_call_id": item.call_id, "content": item.output, "name": name})


def _add_thoughts(chat: Chat, place: str, item: Any) -> None:
    chat.think(place, item.text)


_KINDS: Final[Mapping[str, tuple[type[_Item], Unsupported, Callable[[Chat, str, Any], None]]]] = {
    "message": (MessageItem, _MESSAGE, _add_message),
    "function_call": (CallItem, _CALL, _add_call),
    "function_call_output": (OutputItem, _CALL, _add_output),
    "reasoning": (ReasoningItem, _ITEM, _add_thoughts),
}
