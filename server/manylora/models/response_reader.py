"""Answers read by what a tokenizer itself says of them, its `response_template`, a character at a time."""

import json
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, Final

from manylora.chat.pieces import Arguments, CallStart, Piece, Reasoning, Text, joined

__all__ = ["ResponseReader"]

_REASONING: Final = ("reasoning_content", "reasoning", "thinking")


class ResponseReader:
    """Reads one answer with transformers' parser. Implements `chat.pieces.Reader`.

    A call becomes known when it is whole. What the parser cannot read, and a call of a tool that is not offered, is the
    text that it was written as; behind a fault everything is.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: str,
        tools: Sequence[Mapping[str, Any]],
        *,
        only_one: bool,
        new_id: Callable[[], str],
    ) -> None:
        self._parser = tokenizer.get_response_parser(prefix=prompt, tools=list(tools))
        self._is_offered: Container[str] = {tool["function"]["name"] for tool in tools}
        self._only_one = only_one
        self._new_id = new_id
        self._num_calls = 0
        self._raw = ""  # of a region that is known when it is whole
        self._space = ""
        self._is_begun = False  # a region of text has some
        self._is_broken = False

    def add(self, text: str) -> Sequence[Piece]:
        pieces: list[Piece] = []
        for character in text:
            if self._is_broken:
                pieces.append(Text(character))
                continue
            try:
                events = self._parser.feed(character)
            except Exception:  # noqa: BLE001 - it reads what a model wrote by rules that the model's folder brought
                pieces += self._broken(character)
                continue
            pieces += [piece for event in events for piece in self._pieces(event)]
        return joined(pieces)

    def end(self) -> Sequence[Piece]:
        if self._is_broken:
            return ()
        try:
            _, events = self._parser.finalize()
        except Exception:  # noqa: BLE001 - as above
            return joined(self._broken(""))
        return joined(piece for event in events for piece in self._pieces(event))

    def _broken(self, rest: str) -> list[Piece]:
        self._is_broken = True
        raw, self._raw = self._raw + rest, ""
        return [Text(raw)]

    def _pieces(self, event: Mapping[str, Any]) -> list[Piece]:
        kind, field = event["type"], event["field"]
        if kind == "region_open":
            self._raw, self._space, self._is_begun = "", "", False
        elif kind == "region_chunk" and event["dirty"]:
            self._raw += event["text"]
        elif kind == "region_chunk":
            said = self._trimmed(event["text"])
            return [Reasoning(said) if field in _REASONING else Text(said)]
        elif field == "tool_calls":
            raw, self._raw = self._raw, ""
            return self._calls(event["value"], raw)
        return []

    def _trimmed(self, text: str) -> str:
        """Some of a region's text, without the white space at its edges."""
        text = self._space + text if self._is_begun else text.lstrip()
        said = text.rstrip()
        self._is_begun = self._is_begun or bool(said)
        self._space = text[len(said) :]
        return said

    def _calls(self, value: Any, raw: str) -> list[Piece]:
        pieces: list[Piece] = []
        for call in value if isinstance(value, list) else [value]:
            called = call.get("function") if isinstance(call, dict) else None
            name = called.get("name") if isinstance(called, dict) else None
            if not isinstance(called, dict) or not isinstance(name, str) or name not in self._is_offered:
                return [*pieces, Text(raw)]
            if self._only_one and self._num_calls:
                return pieces
            arguments = called.get("arguments")
            text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
            pieces += [CallStart(self._num_calls, self._new_id(), name), Arguments(self._num_calls, text)]
            self._num_calls += 1
        return pieces
