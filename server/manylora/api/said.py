"""One choice of a chat as its reader splits it: text, what was thought before it, and calls of tools."""

from typing import Any

from pydantic_core import from_json

from manylora.chat.pieces import Arguments, CallStart, Piece, Reader, Reasoning, Text, joined
from manylora.engine.interface import Delta, FinishReason

__all__ = ["Said", "Splitter", "arguments_of"]


class Splitter:
    """Splits one choice's deltas into pieces; without a reader they are text alone.

    `num_reasoning_tokens` counts those of deltas that brought thoughts and nothing else, as far as they have come.
    """

    def __init__(self, reader: Reader | None, *, has_reasoning: bool) -> None:
        """Without `has_reasoning` thoughts are counted and left out."""
        self._reader = reader
        self._has_reasoning = has_reasoning
        self._num_undecided = 0
        self.num_reasoning_tokens = 0

    def split(self, delta: Delta) -> list[Piece]:
        if self._reader is None:
            return [Text(delta.text)] if delta.text else []
        read = self._reader.add(delta.text)
        found = joined([*read, *(self._reader.end() if delta.finish_reason is not None else ())])
        self._num_undecided += len(delta.token_ids)
        if found:
            if all(isinstance(piece, Reasoning) for piece in found):
                self.num_reasoning_tokens += self._num_undecided
            self._num_undecided = 0
        if self._has_reasoning:
            return found
        return [piece for piece in found if not isinstance(piece, Reasoning)]


def arguments_of(text: str) -> dict[str, Any]:
    """A call's arguments as an object: of those that were cut, what there is; of what is no JSON, nothing."""
    try:
        found = from_json(text, allow_partial=True)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


class Said:
    """What was read of a choice, and OpenAI's words for it."""

    def __init__(self, reader: Reader, has_reasoning: bool) -> None:
        self._splitter = Splitter(reader, has_reasoning=has_reasoning)
        self._pieces: list[Piece] = []
        self._num_calls = 0

    def read(self, delta: Delta) -> bool:
        """Take in a delta; whether there is something new to say."""
        found = self._splitter.split(delta)
        self._pieces += found
        self._num_calls += sum(isinstance(piece, CallStart) for piece in found)
        return bool(found)

    def finish_reason(self, reason: str | None) -> str | None:
        return "tool_calls" if reason == FinishReason.STOP and self._num_calls else reason

    def _taken(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return joined(pieces)

    def delta(self) -> dict[str, Any]:
        """What a stream says of all that was read since the last time."""
        delta: dict[str, Any] = {}
        calls: list[dict[str, Any]] = []
        for piece in self._taken():
            if isinstance(piece, CallStart):
                function = {"name": piece.name, "arguments": ""}
                calls.append({"index": piece.index, "id": piece.id, "type": "function", "function": function})
            elif isinstance(piece, Arguments):
                if calls and calls[-1]["index"] == piece.index:
                    calls[-1]["function"]["arguments"] += piece.text
                else:
                    calls.append({"index": piece.index, "function": {"arguments": piece.text}})
            else:
                name = "content" if isinstance(piece, Text) else "reasoning_content"
                delta[name] = delta.get(name, "") + piece.text
        return {**delta, "tool_calls": calls} if calls else delta

    def message(self) -> dict[str, Any]:
        """What a whole message has of it."""
        said = self.delta()
        message: dict[str, Any] = {"content": said.get("content", None if self._num_calls else "")}
        if "reasoning_content" in said:
            message["reasoning_content"] = said["reasoning_content"]
        if "tool_calls" in said:
            message["tool_calls"] = [
                {name: value for name, value in call.items() if name != "index"} for call in said["tool_calls"]
            ]
        return message
