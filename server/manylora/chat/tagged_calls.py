"""Calls of tools whose parts stand between marks or tags of their own, as DeepSeek and Qwen3-Coder write them."""

import json
import re
from collections.abc import Callable, Container, Mapping
from types import MappingProxyType
from typing import Any, Final

from manylora.chat.calls import LONGEST_HEADER, CallFinder, HermesCalls
from manylora.chat.parameters import is_text, schema_of, value_of
from manylora.chat.pieces import Piece
from manylora.chat.scanning import JsonValue

__all__ = ["DeepSeekCalls", "XmlCalls"]

_HEADER: Final = re.compile(
    r"\s*(?:function\s*<｜tool▁sep｜>\s*)?([\w.-]+)\s*(?:<｜tool▁sep｜>\s*)?(?:```(?:json)?\s*)?"
)


class DeepSeekCalls(CallFinder):
    """Calls between marks: each with its name, perhaps behind `function`, and its arguments, perhaps in a fence.

    Arguments that are not whole end with the next mark or fence outside of their strings.
    """

    mark = "<｜tool▁calls▁begin｜>"
    call = "<｜tool▁call▁begin｜>"
    call_end = "<｜tool▁call▁end｜>"
    end_mark = "<｜tool▁calls▁end｜>"
    fence = "```"

    def __init__(self, is_offered: Container[str], *, only_one: bool, new_id: Callable[[], str]) -> None:
        super().__init__(is_offered, only_one=only_one, new_id=new_id)
        self._tag = ""  # of a mark that has begun, or what stands before the arguments
        self._is_fenced = False  # the call at hand, up to the end of the fence
        self._value = JsonValue()

    def _begin_call(self) -> None:
        super()._begin_call()
        self._tag = ""

    def _in_call(self, character: str) -> None:
        """Between the marks of two calls. Behind one, its fence may end and is no text."""
        self._held += character
        is_behind = self._num_calls > 0 and not self._is_called
        if character == "`" and is_behind and self._is_fenced and self._held.strip() == self.fence:
            self._is_fenced = False
            self._held = ""
            return
        if not self._tag and (character.isspace() or (is_behind and character == "`")):
            return
        self._tag += character
        marks = (self.call, self.call_end, self.end_mark)
        if not any(mark.startswith(self._tag) for mark in marks):
            self._no_call()
        elif self._tag == self.call:
            self._tag = ""
            self._state = self._in_header
        elif self._tag in marks:
            is_over, self._tag = self._tag == self.end_mark, ""
            if is_behind:
                self._held, self._is_fenced = "", False
            if is_over:
                self._no_call()

    def _in_header(self, character: str) -> None:
        self._held += character
        if character != "{":
            self._tag += character
            if len(self._tag) > LONGEST_HEADER:
                self._no_call()
            return
        match = _HEADER.fullmatch(self._tag)
        if match is None or match[1] not in self._is_offered:
            self._no_call()
            return
        self._is_fenced = self.fence in self._tag
        self._tag = ""
        self._call(match[1])
        self._value = JsonValue()
        self._state = self._in_arguments
        self._in_arguments(character)

    def _in_arguments(self, character: str) -> None:
        tag = self._tag + character
        ends = (self.call, self.call_end, self.end_mark, self.fence)
        if not self._value.is_in_string and any(end.startswith(tag) for end in ends):
            self._tag = tag
            if tag in ends:
                self._is_called, self._tag = False, ""
                self._state = self._in_call
                for each in tag:
                    self._in_call(each)
            return
        if self._tag:
            held, self._tag = self._tag, ""
            self._argue(held)
            self._in_arguments(character)
            return
        self._value.add(character)
        self._argue(character)
        if self._value.is_done:
            self._is_called = False
            self._state = self._in_call

    def end(self) -> list[Piece]:
        if self._state == self._in_call and self._num_calls:  # a mark that did not come to its end
            self._held = ""
        return super().end()


class XmlCalls(HermesCalls):
    """`<tool_call><function=name><parameter=key>value</parameter>…</function></tool_call>`, as Qwen3-Coder writes it.

    An argument that its schema says is a string is passed on while it is written, another one when it is whole. Of one
    that comes twice the first counts. What is neither closes the call, and the rest of it is dropped.
    """

    function = "<function="
    parameter = "<parameter="
    function_end = "</function>"
    value_ends = ("\n</parameter>", "</parameter>")

    def __init__(
        self,
        is_offered: Container[str],
        *,
        only_one: bool,
        new_id: Callable[[], str],
        schemas: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    ) -> None:
        super().__init__(is_offered, only_one=only_one, new_id=new_id)
        self._schemas = schemas
        self._tag = ""
        self._arguments: Mapping[str, Any] = {}  # the schema of all
        self._keys: set[str] = set()
        self._schema: object = None
        self._value: list[str] | None = None  # None: it goes on as it comes
        self._is_dropped = False
        self._is_first = True  # the line break behind the tag is none of the value's
        self._ending = ""  # of a value that may have ended

    def _begin_call(self) -> None:
        super()._begin_call()
        self._tag = ""

    def _in_call(self, character: str) -> None:
        self._held += character
        if not self._tag and character.isspace():
            return
        self._tag += character
        if character == ">" and self._tag.startswith(self.function):
            name = self._tag[len(self.function) : -1].strip()
            if name in self._is_offered:
                self._open(name)
                return
        if not _may_be(self._tag, self.function) or character == ">":
            self._no_call()

    def _open(self, name: str) -> None:
        self._call(name)
        self._arguments = self._schemas.get(name, {})
        self._keys = set()
        self._tag = ""
        self._state = self._in_function

    def _in_function(self, character: str) -> None:
        """Before an argument, or behind the last."""
        if not self._tag and character.isspace():
            return
        self._tag += character
        if self._tag == self.function_end:
            self._close()
            self._after_object()
        elif character == ">" and self._tag.startswith(self.parameter):
            self._begin_value(self._tag[len(self.parameter) : -1].strip())
        elif not (_may_be(self._tag, self.parameter) or self.function_end.startswith(self._tag)):
            self._close()
            self._end_bad()

    def _close(self) -> None:
        self._argue("}" if self._keys else "{}")
        self._tag = ""

    def _begin_value(self, key: str) -> None:
        self._tag, self._ending, self._is_first = "", "", True
        self._is_dropped = key in self._keys
        self._schema = schema_of(key, self._arguments)
        self._value = None if is_text(self._schema) else []
        if not self._is_dropped:
            self._argue(f"{', ' if self._keys else '{'}{json.dumps(key, ensure_ascii=False)}: ")
            self._argue('"' if self._value is None else "")
        self._keys.add(key)
        self._state = self._in_value

    def _in_value(self, character: str) -> None:
        if self._is_first and character == "\n":
            self._is_first = False
            return
        self._is_first = False
        self._ending += character
        if self._ending in self.value_ends:
            self._end_value()
            return
        first = 0
        while not any(end.startswith(self._ending[first:]) for end in self.value_ends):
            first += 1
        self._add(self._ending[:first])
        self._ending = self._ending[first:]

    def _add(self, text: str) -> None:
        if self._value is not None:
            self._value.append(text)
        elif not self._is_dropped:
            self._argue(json.dumps(text, ensure_ascii=False)[1:-1])

    def _end_value(self) -> None:
        if not self._is_dropped:
            if self._value is None:
                self._argue('"')
            else:
                whole = value_of("".join(self._value), self._schema, self._arguments)
                self._argue(json.dumps(whole, ensure_ascii=False))
        self._state = self._in_function


def _may_be(tag: str, opening: str) -> bool:
    """Whether more can make a tag of it that opens so."""
    return opening.startswith(tag) or (tag.startswith(opening) and len(tag) <= LONGEST_HEADER)
