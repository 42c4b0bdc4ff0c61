"""What an answer is made of, as it comes: text, reasoning, and calls of tools."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

__all__ = ["Arguments", "CallStart", "Piece", "Reader", "Reasoning", "Text", "joined"]


@dataclass(frozen=True, slots=True)
class Text:
    """Some of what is said."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Some of what is thought before it."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins, the `index`-th of the answer from 0 on."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """Some of a call's arguments: all of one call's joined are a JSON object, if what the model wrote is one."""

    index: int
    text: str


Piece: TypeAlias = Text | Reasoning | CallStart | Arguments


class Reader(Protocol):
    """Reads one answer. However its text is split, the pieces joined are the same; no text makes it raise."""

    def add(self, text: str) -> Sequence[Piece]:
        """What is certain once this has come."""
        ...

    def end(self) -> Sequence[Piece]:
        """What was held back."""
        ...


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """The pieces with neighbours of one kind made one, and empty ones left out."""
    found: list[Piece] = []
    for piece in pieces:
        if not isinstance(piece, CallStart) and not piece.text:
            continue
        last = found[-1] if found else None
        if isinstance(piece, Text) and isinstance(last, Text):
            found[-1] = Text(last.text + piece.text)
        elif isinstance(piece, Reasoning) and isinstance(last, Reasoning):
            found[-1] = Reasoning(last.text + piece.text)
        elif isinstance(piece, Arguments) and isinstance(last, Arguments) and piece.index == last.index:
            found[-1] = Arguments(last.index, last.text + piece.text)
        else:
            found.append(piece)
    return found
