"""How a long command says where it is, without knowing who listens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` units of `stage`; `message` is for a person, `values` are the newest figures.

    `tokens` and `seconds` are what a training has taken so far, what it did before it was resumed included. `sample` is
    how a held-out row was answered: `step`, `row`, `wanted`, `answered`; `report`, what is to be known of a file.
    """

    stage: str
    done: int = 0
    total: int = 0
    message: str = ""
    values: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    sample: Mapping[str, Any] | None = None
    report: Mapping[str, Any] | None = None


Listener = Callable[[Progress], None]


def ignore(_: Progress) -> None:
    """The listener of someone who does not care."""


def in_words(seconds: float) -> str:
    """`90` as "1.5 min"."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
