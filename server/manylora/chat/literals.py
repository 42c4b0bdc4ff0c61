"""One call in Python's notation, `name(argument=value, …)`, whose values are literals, by JSON's names too."""

import re
from typing import Any, Final

__all__ = ["parse_call"]

_DEEPEST: Final = 32
_NAME: Final = re.compile(r"[A-Za-z_][\w.-]*")
_NUMBER: Final = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_STRING: Final = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
_ESCAPE: Final = re.compile(r"\\(U[0-9a-fA-F]{8}|u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|.)", re.DOTALL)
_ESCAPED: Final = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0", "\n": ""}
_CONSTANTS: Final = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
_LONGEST_NUMBER: Final = 64


def parse_call(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the arguments. Raises ValueError."""
    reader = _Reader(text)
    name = reader.take(_NAME, "a name")
    reader.expect("(")
    arguments: dict[str, Any] = {}
    for _ in reader.items(")"):
        key = reader.take(_NAME, "an argument's name")
        reader.expect("=")
        arguments[key] = reader.value(0)
    reader.skip_space()
    if reader.at < len(text):
        raise ValueError("more after the call")
    return name, arguments


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self.at = 0

    def skip_space(self) -> None:
        while self.at < len(self._text) and self._text[self.at].isspace():
            self.at += 1

    def take(self, pattern: re.Pattern[str], what: str) -> str:
        self.skip_space()
        match = pattern.match(self._text, self.at)
        if match is None:
            raise ValueError(f"expected {what}")
        self.at = match.end()
        return match[0]

    def comes(self, mark: str) -> bool:
        self.skip_space()
        return self._text.startswith(mark, self.at)

    def expect(self, mark: str) -> None:
        if not self.comes(mark):
            raise ValueError(f"expected {mark}")
        self.at += 1

    def items(self, end: str) -> Any:
        """A turn for each item up to `end`, which is taken too."""
        while not self.comes(end):
            yield
            if not self.comes(end):
                self.expect(",")
        self.at += 1

    def value(self, depth: int) -> Any:
        if depth > _DEEPEST:
            raise ValueError("too deep")
        for opening, closing in ("[]", "()"):
            if self.comes(opening):
                self.at += 1
                return [self.value(depth + 1) for _ in self.items(closing)]
        if self.comes("{"):
            self.at += 1
            return {self._key(): self.value(depth + 1) for _ in self.items("}")}
        if self.comes("'") or self.comes('"'):
            return _unescaped(self.take(_STRING, "a string"))
        match = _NUMBER.match(self._text, self.at)
        return _number(self.take(_NUMBER, "a number")) if match else self._constant()

    def _key(self) -> str:
        key = _unescaped(self.take(_STRING, "a key"))
        self.expect(":")
        return key

    def _constant(self) -> Any:
        name = self.take(_NAME, "a value")
        if name not in _CONSTANTS:
            raise ValueError("no literal")
        return _CONSTANTS[name]


def _number(text: str) -> int | float:
    if len(text) > _LONGEST_NUMBER:
        raise ValueError("too long a number")
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if number in (float("inf"), float("-inf")):
            raise ValueError("too large a number") from None
        return number


def _unescaped(quoted: str) -> str:
    return _ESCAPE.sub(_escape, quoted[1:-1])


def _escape(match: re.Match[str]) -> str:
    what = match[1]
    if len(what) > 1:
        code = int(what[1:], 16)
        return "\ufffd" if 0xD800 <= code <= 0xDFFF or code > 0x10FFFF else chr(code)
    return _ESCAPED.get(what, what if what in "'\"\\/" else match[0])
