"""A model's chat template, which is asked how it reads messages before it is believed.

Some templates read a message's content as a string, some as a list of parts, some as one for one role and as the other
for another; and some leave messages out, such as a system message that does not come first. So a conversation of the
same roles is rendered first with a marker in each message's place: the form is the one in which all markers appear.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from manylora.errors import InvalidRequest, quoted

__all__ = ["ChatTemplate"]

_MARKER = re.compile("probe([0-9]+)probe")
_NUM_REMEMBERED = 1024
_REMEMBERED_LENGTH = 64  # messages


@dataclass(frozen=True, slots=True)
class _Shape:
    """What the form of a message depends on."""

    role: Any
    has_name: bool
    has_call: bool


class ChatTemplate:
    """Renders messages `{role, content}`, whose content is a string, in the form that the template reads.

    Thread-safe. Raises InvalidRequest where there is no template, where it refuses the messages and where it would
    leave one of them out.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._remembered = lru_cache(_NUM_REMEMBERED)(self._in_parts)

    @property
    def exists(self) -> bool:
        return bool(getattr(self._tokenizer, "chat_template", None))

    def fault(self) -> str | None:
        """Why no chat can be served, if so: the template was tried with one message of a user."""
        try:
            self.render([{"role": "user", "content": "hi"}])
        except InvalidRequest as error:
            return error.message
        return None

    def render(
        self, messages: Sequence[dict[str, Any]], *, for_answer: bool = True, continue_final: bool = False
    ) -> str:
        """The text. `for_answer` begins the assistant's turn, `continue_final` leaves the last message open."""
        if not self.exists:
            raise InvalidRequest("This model has no chat template. Use /v1/completions.", param="messages")
        shapes = tuple(_Shape(m.get("role"), "name" in m, "tool_call_id" in m) for m in messages)
        in_parts = (self._remembered if len(shapes) <= _REMEMBERED_LENGTH else self._in_parts)(shapes)
        return self._apply(
            [{**m, "content": _part(m["content"])} if m.get("role") in in_parts else m for m in messages],
            for_answer=for_answer and not continue_final,
            continue_final=continue_final,
        )

    def _in_parts(self, shapes: tuple[_Shape, ...]) -> frozenset[Any]:
        """The roles whose content is to be given as parts. Raises InvalidRequest."""
        roles = frozenset(shape.role for shape in shapes)
        refusal: InvalidRequest | None = None
        missing: list[int] = []
        tried: set[frozenset[Any]] = set()
        for attempt in (frozenset[Any](), None, roles):  # None: as parts for the roles that were missing
            in_parts = frozenset(shapes[number].role for number in missing) if attempt is None else attempt
            if in_parts in tried:
                continue
            tried.add(in_parts)
            try:
                now_missing = self._missing(shapes, in_parts)
            except InvalidRequest as error:
                refusal = refusal or error
                continue
            if not now_missing:
                return in_parts
            missing = missing or now_missing
        if missing:
            raise InvalidRequest(
                f"The model's chat template leaves out 'messages[{missing[0]}]', of the role "
                f"'{quoted(str(shapes[missing[0]].role))}'. Send the chat without it, or say it in another message.",
                param=f"messages[{missing[0]}]",
            )
        assert refusal is not None, "nothing was missing, so every attempt was refused"
        raise refusal

    def _missing(self, shapes: tuple[_Shape, ...], in_parts: frozenset[Any]) -> list[int]:
        """The numbers of the messages that do not appear."""
        text = self._apply([_probe(shape, number, in_parts) for number, shape in enumerate(shapes)])
        seen = set(map(int, _MARKER.findall(text)))
        return [number for number in range(len(shapes)) if number not in seen]

    def _apply(self, messages: list[dict[str, Any]], *, for_answer: bool = True, continue_final: bool = False) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=for_answer, continue_final_message=continue_final
                )
            )
        except Exception as error:  # noqa: BLE001 - a template is the model's own program, and can fail in any way
            reason = quoted(str(error) or type(error).__name__)
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {reason}", param="messages"
            ) from None


def _part(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _probe(shape: _Shape, number: int, in_parts: frozenset[Any]) -> dict[str, Any]:
    marker = f"probe{number}probe"
    message: dict[str, Any] = {"content": _part(marker) if shape.role in in_parts else marker}
    if shape.role is not None:
        message["role"] = shape.role
    if shape.has_name:
        message["name"] = "name"
    if shape.has_call:
        message["tool_call_id"] = "call00000"
    return message
