"""A look at training data before the work: what is odd about a file's rows, and what is learnt of each.

This module imports no torch and no numpy.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

from manylora.lifecycle.data.data import Dataset, Example

if TYPE_CHECKING:
    from manylora.lifecycle.data.encoding import Encoded

__all__ = ["OddRows", "Seen", "label_counts", "odd_rows", "remarks", "seen"]

_ROWS: Final = 5  # that a remark names
_LABELS: Final = 20  # that are counted out


def label_counts(dataset: Dataset) -> str:
    """How many rows each label has, the most frequent first; empty without labels."""
    counts = Counter(example.label for example in dataset.examples if example.label is not None)
    if not counts:
        return ""
    told = ", ".join(f"{label} {count}" for label, count in counts.most_common(_LABELS))
    return f"labels: {told}{f' and {len(counts) - _LABELS} more' if len(counts) > _LABELS else ''}"


@dataclass(frozen=True, slots=True)
class OddRows:
    """Numbers of rows that repeat earlier ones, that want another answer to the same question, that ask nothing."""

    repeated: list[int]
    contrary: list[int]
    empty: list[int]


def odd_rows(examples: Sequence[Example], shape: str) -> OddRows:
    """What speaks against rows. Of pairs none is contrary: several texts may belong to one."""
    by_prompt: dict[Any, list[Example]] = {}
    for example in examples:
        by_prompt.setdefault((example.prompt, example.tools), []).append(example)
    twice, contrary = list[int](), list[int]()
    for same in by_prompt.values():
        answers: dict[Any, Example] = {}
        for example in same:
            answers.setdefault((example.messages[-1], example.rejected), example)
        twice += [e.row for e in same if answers[e.messages[-1], e.rejected] is not e]
        contrary += [e.row for e in same] if shape != "pair" and len({e.messages[-1] for e in same}) > 1 else []
    return OddRows(twice, contrary, [example.row for example in examples if _says_nothing(example)])


def remarks(dataset: Dataset) -> list[str]:
    """What speaks against a file's rows, a sentence each, with the first rows that it is about."""
    odd = odd_rows(dataset.examples, dataset.shape)
    found = [
        (odd.repeated, "Rows that repeat earlier ones, which so weigh more"),
        (
            odd.contrary,
            "Rows that ask what another one asks and want a different answer, which cannot be learnt for sure",
        ),
        (odd.empty, "Rows that ask nothing with a letter or digit"),
    ]
    return [f"{said}: {len(rows)} ({_named(rows)})." for rows, said in found if rows]


def _says_nothing(example: Example) -> bool:
    asked = "".join(message.content for message in example.prompt if message.role in ("user", "tool"))
    return not any(c.isalnum() for c in asked)


def _named(rows: Sequence[int]) -> str:
    first = sorted(rows)[:_ROWS]
    return f"row{'s' * (len(rows) > 1)} {', '.join(map(str, first))}{', …' if len(rows) > _ROWS else ''}"


@dataclass(frozen=True, slots=True)
class Seen:
    """A row as the model gets it: its text in pieces, each with whether it is learnt."""

    row: int
    pieces: tuple[tuple[str, bool], ...]
    num_tokens: int
    num_cut: int


def seen(encoded: "Sequence[Encoded]", tokenizer: Any) -> Iterator[Seen]:
    """What training sees of these examples, special tokens included."""
    for one in encoded:
        runs = groupby(zip(one.ids, one.is_answer, strict=True), key=lambda pair: pair[1])
        pieces = tuple((str(tokenizer.decode([token for token, _ in run])), learnt) for learnt, run in runs)
        yield Seen(one.example.row, pieces, len(one), one.num_cut)
