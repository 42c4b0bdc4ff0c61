"""What a recipe is: a way to make data, and the settings that train a good adapter from it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from manylora.lifecycle.output import atomic_folder

Row = dict[str, str]


@dataclass(frozen=True, slots=True)
class Splits:
    """Rows for training, for choosing the best step, and for the scores in the card; no row in two of them."""

    train: Sequence[Row]
    valid: Sequence[Row]
    test: Sequence[Row]


@dataclass(frozen=True, slots=True)
class Recipe:
    """`make(seed, source)` builds the data; `source` replaces what the recipe would download.

    `instruction` tells a bare base the task, for a fair comparison; the adapter is trained without it.
    """

    name: str
    title: str
    summary: str
    origin: str
    licence: str
    make: Callable[[int, Path | None], Splits]
    flags: tuple[str, ...]
    example: str
    max_tokens: int
    instruction: str
    metrics: tuple[str, ...] = ("exact_match", "perplexity")


def write_splits(splits: Splits, out: Path) -> None:
    """Three JSON-lines files in a new folder, whole or not at all."""
    with atomic_folder(out) as draft:
        for name, rows in (("train", splits.train), ("valid", splits.valid), ("test", splits.test)):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (draft / f"{name}.jsonl").write_text(text, encoding="utf-8")
