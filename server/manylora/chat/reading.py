"""One answer read as it comes: what the model thinks is split off, then calls are found in what it says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

from manylora.chat.calls import CallFinder, HermesCalls, LlamaCalls, MistralCalls, PythonicCalls, new_call_id
from manylora.chat.format import Syntax
from manylora.chat.pieces import Piece, Reader, Reasoning, Text, joined
from manylora.chat.tagged_calls import DeepSeekCalls, XmlCalls

__all__ = ["Reading"]


@dataclass(frozen=True)
class Reading:
    """How answers to one prompt are read; each has its own `reader`.

    `reasoning` are the marks around what the model thinks; with `is_thinking` the prompt ends within them. `tools` are
    the names that may be called, of which `only_one` is; `schemas` are those of their arguments.
    """

    reasoning: tuple[str, str] | None = None
    is_thinking: bool = False
    syntax: Syntax | None = None
    tools: tuple[str, ...] = ()
    only_one: bool = False
    schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.tools)

    def reader(self) -> Reader:
        finder = self._finder(self.syntax) if self.syntax and self.tools else None
        return _Reader(_Splitter(self.reasoning, is_thinking=self.is_thinking) if self.reasoning else None, finder)

    def _finder(self, syntax: Syntax) -> CallFinder:
        def new_id() -> str:
            return new_call_id(syntax)

        if syntax == "qwen3_coder":
            return XmlCalls(self._names, only_one=self.only_one, new_id=new_id, schemas=self.schemas)
        return _FINDERS[syntax](self._names, only_one=self.only_one, new_id=new_id)


_FINDERS: Final[dict[Syntax, type[CallFinder]]] = {
    "hermes": HermesCalls,
    "llama3_json": LlamaCalls,
    "mistral": MistralCalls,
    "mistral_args": MistralCalls,
    "pythonic": PythonicCalls,
    "deepseek_v3": DeepSeekCalls,
    "deepseek_v31": DeepSeekCalls,
}


class _Reader:
    """Implements `pieces.Reader`."""

    def __init__(self, splitter: "_Splitter | None", finder: CallFinder | None) -> None:
        self._splitter = splitter
        self._finder = finder

    def add(self, text: str) -> Sequence[Piece]:
        return joined(self._found([Text(text)] if self._splitter is None else self._splitter.add(text)))

    def end(self) -> Sequence[Piece]:
        found = [] if self._splitter is None else self._found(self._splitter.end())
        return joined([*found, *([] if self._finder is None else self._finder.end())])

    def _found(self, split: Sequence[Piece]) -> list[Piece]:
        if self._finder is None:
            return list(split)
        finder = self._finder
        return [each for piece in split for each in (finder.add(piece.text) if isinstance(piece, Text) else (piece,))]


class _Splitter:
    """Splits what comes between two marks at an answer's beginning from the rest, and drops white space at their edges.

    An answer that does not begin with the first mark, unless the prompt ended with it, has none.
    """

    def __init__(self, marks: tuple[str, str], *, is_thinking: bool) -> None:
        self._start, self._end = marks
        self._where = "thinking" if is_thinking else "before"
        self._held = ""  # of a mark, with the white space before it
        self._has_thought = False

    def add(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        if self._where == "before":
            begun = self._held.lstrip()
            if begun.startswith(self._start):
                self._where, self._held = "thinking", begun[len(self._start) :]
            elif not self._start.startswith(begun):
                self._where = "saying"
        if self._where == "thinking":
            pieces += self._think()
        if self._where == "behind":
            self._held = self._held.lstrip()
            self._where = "saying" if self._held else "behind"
        if self._where == "saying":
            pieces.append(Text(self._held))
            self._held = ""
        return pieces

    def end(self) -> list[Piece]:
        held, self._held = self._held, ""
        return [Reasoning(held.rstrip())] if self._where == "thinking" else [Text(held)]

    def _think(self) -> list[Piece]:
        if not self._has_thought:
            self._held = self._held.lstrip()
        found = self._held.find(self._end)
        if found >= 0:
            thought, self._held = self._held[:found].rstrip(), self._held[found + len(self._end) :]
            self._where = "behind"
        else:
            thought = self._held[: len(self._held) - _num_begun(self._held, self._end)].rstrip()
            self._held = self._held[len(thought) :]
        self._has_thought = self._has_thought or bool(thought)
        return [Reasoning(thought)]


def _num_begun(text: str, mark: str) -> int:
    """Length of the longest end of `text` that is a beginning of `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
