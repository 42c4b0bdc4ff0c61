"""What a recipe is: a way to make data, and the settings that train a good adapter from it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from manylora.errors import InvalidRequest
from manylora.lifecycle.output import atomic_folder

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Splits:
    """Rows for training, for choosing the best step, and for the scores in the card; no row in two of them."""

    train: Sequence[Row]
    valid: Sequence[Row]
    test: Sequence[Row]


@dataclass(frozen=True, slots=True)
class Recipe:
    """`make(seed, source)` builds the data; `source` replaces what the recipe would download.

    `package_file` names that download; empty: the data is generated and there is none.
    `instruction` tells a bare base the task, for a fair comparison; the adapter is trained without it.
    `defaults` become the shipped folder's `manylora.json`; where they hold answers to something, the card says what
    that changes.
    `asked_with` are further fields of the request in the card.
    `shown` are the metrics in the card's table; empty: all. `limits` says what the adapter is not good at.
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
    shown: tuple[str, ...] = ()
    limits: str = ""
    package_file: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    asked_with: Mapping[str, Any] = field(default_factory=dict)

    @property
    def held_to(self) -> str:
        """What the defaults hold answers to: `labels`, `schema`, or nothing (empty)."""
        if "choices" in self.defaults:
            return "labels"
        return "schema" if "structured_outputs" in self.defaults else ""

    @property
    def held_metrics(self) -> tuple[str, ...]:
        """The metrics that say what holding answers changes."""
        if self.held_to == "labels":
            return ("accuracy", "macro_f1")
        return tuple(metric for metric in self.metrics if metric != "perplexity")

    def splits(self, seed: int, source: Path | None = None) -> Splits:
        """The data. Raises InvalidRequest for a `source` that is missing, wrong, or not asked for."""
        return self.make(seed, source_of(self.name, self.package_file, source))


def source_of(name: str, package_file: str, source: Path | None) -> Path | None:
    """The file to take data from, named by `package_file`. Raises InvalidRequest where it is missing or not asked."""
    if source is not None and not package_file:
        raise InvalidRequest(f"The data of {name} is generated: there is nothing to take from --source.")
    if source is not None and not source.is_file():
        raise InvalidRequest(f"{source} does not exist or is not a file. --source is {package_file}.")
    return source


def write_splits(splits: Splits, out: Path) -> None:
    """Three JSON-lines files in a new folder, whole or not at all."""
    with atomic_folder(out) as draft:
        for name, rows in (("train", splits.train), ("valid", splits.valid), ("test", splits.test)):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (draft / f"{name}.jsonl").write_text(text, encoding="utf-8")
