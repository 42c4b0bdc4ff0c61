"""Calls of tools found in what a model writes, in each of the notations of `format.Syntax`.

Everything goes character by character, so that it makes no difference how a text was split, and what turns out to be no
call is passed on as the text that it is. A call of a tool that was not offered is none.
"""

import json
import re
import secrets
import string
from collections.abc import Callable, Container
from typing import Final

from manylora.chat.format import Syntax
from manylora.chat.literals import parse_call
from manylora.chat.pieces import Arguments, CallStart, Piece, Text
from manylora.chat.scanning import CallObject, JsonValue

__all__ = [
    "LONGEST_HEADER",
    "CallFinder",
    "HermesCalls",
    "LlamaCalls",
    "MistralCalls",
    "PythonicCalls",
    "new_call_id",
]

LONGEST_HEADER: Final = 512
_ALPHANUMERIC: Final = string.ascii_letters + string.digits
_HEADER: Final = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*[\w-]+\s*)?(?:\[ARGS\]\s*)?")
_CALL_BEGINS: Final = re.compile(r"[A-Za-z_][\w.-]*\s*")


def new_call_id(syntax: Syntax | None) -> str:
    """An id as clients have it from OpenAI; templates of Mistral insist on nine letters and digits."""
    if syntax in ("mistral", "mistral_args"):
        return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))
    return f"call_{secrets.token_hex(12)}"


class CallFinder:
    """Reads text with calls in it. Implements `pieces.Reader`.

    `is_offered` has the names of the tools. With `only_one`, further calls are dropped. White space beside a call is no
    text. Each notation is a subclass: `_state` takes the next character, `_held` is what may yet be text.
    """

    mark = ""  # that a call begins with, wherever it stands

    def __init__(self, is_offered: Container[str], *, only_one: bool, new_id: Callable[[], str]) -> None:
        self._is_offered = is_offered
        self._only_one = only_one
        self._new_id = new_id
        self._pieces: list[Piece] = []
        self._state: Callable[[str], None] = self._in_text
        self._held = ""
        self._space = ""  # that is text if more text follows
        self._has_said = False
        self._is_after_call = False
        self._num_calls = 0
        self._object = CallObject()
        self._is_called = False  # the call at hand has been passed on

    def add(self, text: str) -> list[Piece]:
        for character in text:
            self._state(character)
        return self._taken()

    def end(self) -> list[Piece]:
        if not self._is_called:
            self._say(self._held)
        if self._space and not self._num_calls:
            self._pieces.append(Text(self._space))
        return self._taken()

    def _taken(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    # text

    def _say(self, text: str) -> None:
        self._held = ""
        said = text.rstrip()
        if said:
            self._pieces.append(Text(said.lstrip() if self._is_after_call else self._space + said))
            self._space = ""
            self._has_said = True
            self._is_after_call = False
        self._space += text[len(said) :]

    def _in_text(self, character: str) -> None:
        """Text, in which `mark` may begin a call."""
        held = self._held + character
        if self.mark and self.mark.startswith(held):
            self._held = held
            if held == self.mark:
                self._begin_call()
            return
        first = 1
        while self.mark and first < len(held) and not self.mark.startswith(held[first:]):
            first += 1
        rest = held[first:]
        self._say(held[:first])
        self._held = rest

    def _begin_call(self) -> None:
        self._is_called = False
        self._object = CallObject()
        self._state = self._in_call

    def _in_call(self, character: str) -> None:
        """What comes between `mark` and the call."""
        raise NotImplementedError

    def _no_call(self) -> None:
        """What is held was none, so it is text."""
        held, self._state = self._held, self._in_text
        self._say(held)

    # calls

    def _call(self, name: str) -> None:
        """A call of an offered tool begins. What was written of it is no text any more."""
        if not self._is_called:
            self._is_called = True
            self._held = ""
            self._space = ""
            self._is_after_call = True
            self._has_said = False
            self._num_calls += 1
            if self._is_passed_on:
                self._pieces.append(CallStart(self._num_calls - 1, self._new_id(), name))

    @property
    def _is_passed_on(self) -> bool:
        return self._num_calls <= 1 or not self._only_one

    def _argue(self, text: str) -> None:
        if text and self._is_passed_on:
            self._pieces.append(Arguments(self._num_calls - 1, text))

    def _in_object(self, character: str) -> None:
        """A call as a JSON object, at whose end `_after_object` goes on."""
        if not self._is_called:
            self._held += character
        self._object.add(character)
        name = self._object.name
        if name is not None and not self._object.is_bad and not self._is_called:
            if name in self._is_offered:
                self._call(name)
            else:
                self._object.is_bad = True
        if self._is_called:
            self._argue(self._object.take())
        if self._object.is_bad:
            self._end_bad()
        elif self._object.is_done:
            self._after_object()

    def _end_bad(self) -> None:
        if self._is_called:
            self._after_object()
        else:
            self._no_call()

    def _after_object(self) -> None:
        self._is_called = False
        self._state = self._in_text


class HermesCalls(CallFinder):
    """`<tool_call>{…}</tool_call>`. Up to the closing tag, white space and `}` are no text."""

    mark = "<tool_call>"
    closing = "</tool_call>"

    def _in_call(self, character: str) -> None:
        self._state = self._in_object
        self._in_object(character)

    def _after_object(self) -> None:
        self._is_called = False
        self._state = self._in_closing

    def _end_bad(self) -> None:
        if self._is_called:
            self._state = self._in_rest
        else:
            self._no_call()

    def _in_rest(self, character: str) -> None:
        """What is left of a call that went wrong: dropped up to the closing tag."""
        self._held = (self._held + character)[-len(self.closing) :]
        if self._held == self.closing:
            self._held = ""
            self._is_called = False
            self._state = self._in_text

    def end(self) -> list[Piece]:
        if self._state == self._in_closing:
            self._held = ""
        return super().end()

    def _in_closing(self, character: str) -> None:
        held = self._held + character
        if self.closing.startswith(held):
            self._held = "" if held == self.closing else held
            if held == self.closing:
                self._state = self._in_text
        elif self._held or not (character.isspace() or character == "}"):
            self._held = ""
            self._state = self._in_text
            for each in held:
                self._state(each)


class MistralCalls(CallFinder):
    """`[TOOL_CALLS]` before a list of objects, or before each name with its arguments behind `[ARGS]` or at once."""

    mark = "[TOOL_CALLS]"

    def __init__(self, is_offered: Container[str], *, only_one: bool, new_id: Callable[[], str]) -> None:
        super().__init__(is_offered, only_one=only_one, new_id=new_id)
        self._is_list = False
        self._header = ""
        self._value = JsonValue()

    def _in_call(self, character: str) -> None:
        self._held += character
        if character.isspace():
            return
        if character in "[{":
            self._is_list = character == "["
            self._object = CallObject()
            self._state = self._in_object
            if not self._is_list:
                self._held = self._held[:-1]
                self._in_object(character)
            return
        self._header = character
        self._state = self._in_header

    def _after_object(self) -> None:
        super()._after_object()
        if self._is_list:
            self._state = self._in_list

    def _in_list(self, character: str) -> None:
        if character == ",":
            self._begin_call()
            self._state = self._in_object
        elif not character.isspace():
            self._state = self._in_text
            if character != "]":
                self._in_text(character)

    def _in_header(self, character: str) -> None:
        if character != "{":
            self._held += character
            self._header += character
            if len(self._header) > LONGEST_HEADER:
                self._no_call()
            return
        match = _HEADER.fullmatch(self._header)
        if match is None or match[1] not in self._is_offered:
            self._held += character
            self._no_call()
            return
        self._call(match[1])
        self._value = JsonValue()
        self._state = self._in_arguments
        self._in_arguments(character)

    def _in_arguments(self, character: str) -> None:
        self._value.add(character)
        self._argue(character)
        if self._value.is_done:
            self._is_called = False
            self._state = self._in_text


class LlamaCalls(CallFinder):
    """`{…}` as the whole answer, several with `;` between, or behind `<|python_tag|>`."""

    mark = "<|python_tag|>"

    def _in_text(self, character: str) -> None:
        if self._has_said or self._held or not (character == "{" or (character in ";," and self._num_calls)):
            super()._in_text(character)
            return
        self._begin_call()
        if character == "{":
            self._in_call(character)
        else:
            self._held = character

    def _in_call(self, character: str) -> None:
        if character.isspace():
            self._held += character
            return
        self._state = self._in_object
        self._in_object(character)


class PythonicCalls(CallFinder):
    """`[name(argument=value), …]` as the whole answer."""

    def __init__(self, is_offered: Container[str], *, only_one: bool, new_id: Callable[[], str]) -> None:
        super().__init__(is_offered, only_one=only_one, new_id=new_id)
        self._call_text: list[str] = []
        self._depth = 0
        self._quote = ""
        self._is_escaped = False

    def _in_text(self, character: str) -> None:
        if character == "[" and not self._has_said:
            self._held = character
            self._state = self._between
            return
        super()._in_text(character)

    def _between(self, character: str) -> None:
        """Before a call of the list, or behind one."""
        if character == "]" and self._num_calls:
            self._held = ""
            self._state = self._in_text
            return
        self._held += character
        if character.isspace() or (character == "," and self._num_calls):
            return
        self._call_text, self._depth, self._quote, self._is_escaped = [], 0, "", False
        self._state = self._in_python
        self._note(character)

    def _in_python(self, character: str) -> None:
        self._held += character
        self._note(character)

    def _note(self, character: str) -> None:
        self._call_text.append(character)
        if self._is_escaped:
            self._is_escaped = False
        elif self._quote:
            self._is_escaped = character == "\\"
            self._quote = "" if character == self._quote else self._quote
        elif character in "'\"" and self._depth:
            self._quote = character
        elif character in "([{":
            self._depth += 1
            if self._depth == 1 and not _CALL_BEGINS.fullmatch("".join(self._call_text[:-1])):
                self._no_call()
        elif character in ")]}":
            self._depth -= 1
            if self._depth <= 0:
                self._take_call()
        elif not self._depth and len(self._call_text) > LONGEST_HEADER:
            self._no_call()

    def _take_call(self) -> None:
        try:
            name, arguments = parse_call("".join(self._call_text))
        except ValueError:
            name, arguments = "", {}
        if not name or name not in self._is_offered:
            self._no_call()
            return
        self._is_called = False
        self._call(name)
        self._argue(json.dumps(arguments, ensure_ascii=False))
        self._is_called = False
        self._state = self._between
