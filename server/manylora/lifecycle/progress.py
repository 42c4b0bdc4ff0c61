"""How a long command says where it is, without knowing who listens."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` units of `stage`; `message` is for a person, `values` are the newest figures.

    `tokens` and `seconds` are what a training has taken so far, what it did before it was resumed included.
    """

    stage: str
    done: int = 0
    total: int = 0
    message: str = ""
    values: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0


Listener = Callable[[Progress], None]


def ignore(_: Progress) -> None:
    """The listener of someone who does not care."""
