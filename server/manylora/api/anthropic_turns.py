"""Turns of a conversation as Anthropic has them become the messages of a chat.

What calls returned stands among a user's blocks there and in messages of its own here. Turns of one role that follow
each other are one, and blocks of text are joined by line breaks.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from manylora.api.fields import NOTHING, Unsupported, wanted
from manylora.api.messages import MAX_NAME
from manylora.api.schemas import MAX_MESSAGES
from manylora.api.strict import Strict
from manylora.api.translation import valid
from manylora.errors import InvalidRequest, quoted

__all__ = ["Turns", "turns_of"]

_TEXT: Final[Unsupported] = {"citations": ({"enabled": False}, *NOTHING)}
_CALLER: Final[Unsupported] = {"caller": ({"type": "direct"}, *NOTHING), "toolset_name": NOTHING}
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]


class _Block(Strict):
    """`cache_control` is a hint for servers that keep prompts only when told to. Here every prompt is kept."""

    cache_control: dict[str, Any] | None = None


class TextBlock(_Block):
    """What is said."""

    type: Literal["text"]
    text: str


class CallBlock(_Block):
    """What the assistant called."""

    type: Literal["tool_use"]
    id: Name
    name: Name
    input: dict[str, Any]


class ResultBlock(_Block):
    """What a call returned."""

    type: Literal["tool_result"]
    tool_use_id: Name
    content: str = ""  # blocks are joined before
    is_error: bool = False


class ThinkingBlock(Strict):
    """What the assistant thought. The signature that Anthropic's clients need is an answer's own, and not looked at."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


_KINDS: Final[dict[str, tuple[type[Strict], Unsupported]]] = {
    "text": (TextBlock, _TEXT),
    "tool_use": (CallBlock, _CALLER),
    "tool_result": (ResultBlock, _CALLER),
    "thinking": (ThinkingBlock, {}),
}
_OF_ROLE: Final = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "tool_use", "thinking"),
    "system": ("text",),
}


@dataclass
class Turns:
    """The messages, and of each the place that it comes from, for errors about it.

    `is_begun`: the last is the beginning of the answer.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    is_begun: bool = False
    _texts: list[str] = field(default_factory=list)  # of the last message

    def add(self, place: str, message: dict[str, Any]) -> None:
        self.end()
        self.messages.append(message)
        self.places.append(place)
        self._texts.append(message["content"])

    def say(self, place: str, role: str, text: str) -> None:
        """A message of text, or more text for the last one of the same role."""
        last = self.messages[-1] if self.messages else None
        if last is not None and last["role"] == role and not last.get("tool_calls"):
            self._texts.append(text)
        else:
            self.add(place, {"role": role, "content": text})

    def end(self) -> None:
        """All of the last message's text is there."""
        if self._texts:
            begun = next((number for number, text in enumerate(self._texts) if text), len(self._texts) - 1)
            self.messages[-1]["content"] = "\n".join(self._texts[begun:])
            self._texts.clear()

    @property
    def names(self) -> dict[str, str]:
        """What the body calls each message."""
        return {f"messages[{number}]": place for number, place in enumerate(self.places)}


def turns_of(given: list[Any], system: str | list[Any] | None) -> Turns:
    """Raises InvalidRequest with the place of the first block at fault."""
    if not given:
        raise InvalidRequest("'messages' is empty. Send at least one message.", param="messages")
    if len(given) > MAX_MESSAGES:
        raise InvalidRequest(
            f"'messages' has {len(given)} messages; at most {MAX_MESSAGES} are taken. Send less of the history.",
            param="messages",
        )
    turns = Turns()
    if system is not None and system != []:
        turns.say("system", "system", _text_of(_blocks(system, "system", "system")))
    for number, turn in enumerate(given):
        _add_turn(turns, turn, f"messages[{number}]")
    turns.end()
    last = turns.messages[-1]
    if last["role"] == "assistant" and last.get("tool_calls"):
        raise InvalidRequest(
            f"'{turns.places[-1]}' ends with calls. Send what they returned, as 'tool_result' blocks of the user.",
            param=turns.places[-1],
        )
    turns.is_begun = last["role"] == "assistant"
    return turns


def _add_turn(turns: Turns, turn: Any, place: str) -> None:
    if not isinstance(turn, dict):
        raise InvalidRequest(f"'{place}' must be an object.", param=place)
    kept = wanted(turn, ("role", "content"), {}, where=f"{place}.")
    role = kept.get("role")
    if not isinstance(role, str) or role not in _OF_ROLE:
        raise InvalidRequest(f"'{place}.role' must be one of {', '.join(_OF_ROLE)}.", param=f"{place}.role")
    if "content" not in kept:
        raise InvalidRequest(f"The field '{place}.content' is required.", param=f"{place}.content")
    blocks = _blocks(kept["content"], f"{place}.content", role)
    if role == "assistant":
        _add_answer(turns, place, blocks)
        return
    texts: list[Any] = []
    for block in blocks:
        if isinstance(block, ResultBlock):
            if texts:
                turns.say(place, role, _text_of(texts))
                texts = []
            turns.add(place, {"role": "tool", "tool_call_id": block.tool_use_id, "content": _result(block)})
        else:
            texts.append(block)
    if texts:
        turns.say(place, role, _text_of(texts))


def _add_answer(turns: Turns, place: str, blocks: list[Any]) -> None:
    thoughts = "\n\n".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock))
    calls = [
        {"id": block.id, "function": {"name": block.name, "arguments": block.input}}
        for block in blocks
        if isinstance(block, CallBlock)
    ]
    text = _text_of([block for block in blocks if isinstance(block, TextBlock)])
    if thoughts:
        turns.add(place, {"role": "assistant", "content": text, "reasoning_content": thoughts})
    else:
        turns.say(place, "assistant", text)
    if calls:
        turns.messages[-1]["tool_calls"] = calls


def _text_of(blocks: list[Any]) -> str:
    return "\n".join(block.text for block in blocks)


def _result(block: ResultBlock) -> str:
    """What a call returned; that it failed is said in words, since templates have no other place for it."""
    return f"Error: {block.content}" if block.is_error else block.content


def _blocks(given: Any, place: str, role: str) -> list[Any]:
    """The checked blocks of a content. Raises InvalidRequest."""
    if isinstance(given, str):
        return [TextBlock(type="text", text=given)]
    if not isinstance(given, list) or not (given or role == "assistant"):
        raise InvalidRequest(f"'{place}' must be a string or a list of blocks, and not empty.", param=place)
    return [_block(each, f"{place}[{number}]", _OF_ROLE[role]) for number, each in enumerate(given)]


def _block(given: Any, place: str, kinds: tuple[str, ...]) -> Any:
    kind = given.get("type") if isinstance(given, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise InvalidRequest(
            f"'{place}' is of the type '{quoted(str(kind))}', which is not supported here: send {', '.join(kinds)}.",
            param=f"{place}.type",
        )
    schema, unsupported = _KINDS[kind]
    kept = wanted(given, schema.model_fields, unsupported, where=f"{place}.")
    if kind == "tool_result" and isinstance(kept.get("content"), list):
        parts = [_block(each, f"{place}.content[{at}]", ("text",)) for at, each in enumerate(kept["content"])]
        kept["content"] = _text_of(parts)
    return valid(schema, kept, place)
