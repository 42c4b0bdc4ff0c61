"""A call as a JSON object, read a character at a time, so that its arguments can be passed on as they are written."""

import json
from typing import Final

__all__ = ["CallObject", "JsonValue"]

_LONGEST_NAME: Final = 256
_NAME_KEYS: Final = ("name", "function")
_ARGUMENT_KEYS: Final = ("arguments", "parameters")
_OTHER_KEYS: Final = ("type", "id")  # that may come before the name
_LONGEST_KEY: Final = 16


class JsonValue:
    """Finds the end of one JSON value: `add` each character; `text` is what it has so far.

    A number or a word ends with the first character that is no part of it, for which `add` is False.
    """

    def __init__(self) -> None:
        self._characters: list[str] = []
        self._depth = 0
        self._is_in_string = False
        self._is_escaped = False
        self.is_done = False

    @property
    def text(self) -> str:
        return "".join(self._characters)

    def __len__(self) -> int:
        return len(self._characters)

    @property
    def is_container(self) -> bool:
        return bool(self._characters) and self._characters[0] in "{["

    @property
    def is_in_string(self) -> bool:
        """Whether what comes next is within a string, so that nothing of it can be a mark."""
        return self._is_in_string

    def add(self, character: str) -> bool:
        """Whether the character belongs to it."""
        if self._is_in_string:
            self._in_string(character)
        elif character == '"':
            if self._characters and not self._depth:
                self.is_done = True
                return False
            self._is_in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]" and self._depth:
            self._depth -= 1
            self.is_done = not self._depth
        elif not self._depth and (character in ",}]:" or character.isspace()):
            self.is_done = True
            return False
        self._characters.append(character)
        return True

    def _in_string(self, character: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif character == "\\":
            self._is_escaped = True
        elif character == '"':
            self._is_in_string = False
            self.is_done = not self._depth


class CallObject:
    """`{"name": …, "arguments": {…}}`, in either order and with `parameters` for `arguments`.

    `name` is None until it is known. `take` gives what came of the arguments since the last time, in JSON, once the
    name is known. `is_bad`: this is no call. `is_done`: it is, and whole. Of a key that comes twice the first counts.
    Other keys say nothing, once the name has been seen.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.is_bad = False
        self.is_done = False
        self._expects = "{"
        self._key = ""
        self._value = JsonValue()
        self._has_arguments = False
        self._waiting: list[str] = []

    def take(self) -> str:
        if self.name is None:
            return ""
        taken, self._waiting = "".join(self._waiting), []
        return taken

    def add(self, character: str) -> None:
        if self._expects in ("key", "value"):
            self._in_value(character)
        elif character.isspace():
            return
        elif self._expects == "{" and character == "{":
            self._begin("key")
        elif self._expects == ":" and character == ":":
            self._begin("value")
        elif self._expects == "," and character == ",":
            self._begin("key")
        elif self._expects == "," and character == "}":
            self._end()
        else:
            self.is_bad = True

    def _begin(self, what: str) -> None:
        self._expects = what
        self._value = JsonValue()

    def _end(self) -> None:
        if self.name is None:
            self.is_bad = True
            return
        if not self._has_arguments:
            self._waiting.append("{}")
        self.is_done = True

    def _in_value(self, character: str) -> None:
        if not len(self._value):
            if character.isspace():
                return
            if not self._may_begin(character):
                self.is_bad = True
                return
        belongs = self._value.add(character)
        is_argument = self._expects == "value" and self._key in _ARGUMENT_KEYS and not self._has_arguments
        if belongs and is_argument and self._value.is_container:
            self._waiting.append(character)
        if self._value.is_done:
            self._take_key() if self._expects == "key" else self._take_value()
            if not belongs and not self.is_bad:
                self.add(character)
        else:
            is_name = self._expects == "value" and self._key in _NAME_KEYS and self.name is None
            longest = _LONGEST_KEY if self._expects == "key" and self.name is None else 2 * _LONGEST_NAME
            if (is_name or self._expects == "key") and len(self._value) > longest:
                self.is_bad = True

    def _may_begin(self, character: str) -> bool:
        if self._expects == "key" or (self._key in _NAME_KEYS and self.name is None):
            return character == '"'
        if self._key in _ARGUMENT_KEYS and not self._has_arguments:
            return character in '{"n'  # an object, one in a string, or null
        return character not in ",:]}"

    def _take_key(self) -> None:
        self._key = self._value.text[1:-1]
        self.is_bad = self.name is None and self._key not in (*_NAME_KEYS, *_ARGUMENT_KEYS, *_OTHER_KEYS)
        self._expects = ":"

    def _take_value(self) -> None:
        self._expects = ","
        text = self._value.text
        if self._key in _NAME_KEYS and self.name is None:
            self.name = _string(text)
            self.is_bad = self.name is None or len(self.name) > _LONGEST_NAME
        elif self._key in _ARGUMENT_KEYS and not self._has_arguments:
            self._has_arguments = True
            if not self._value.is_container:
                inner = "{}" if text == "null" else _string(text)
                self.is_bad = inner is None or not _is_object(inner)
                self._waiting.append(inner or "")


def _string(text: str) -> str | None:
    try:
        value = json.loads(text)
        if isinstance(value, str):
            value.encode()
            return value
    except ValueError:
        pass
    return None


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
