"""Labels of words: a head with scores for each token, of which a word's first one says its label."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch.nn import functional

from manylora.lifecycle.data.data import Dataset, Example
from manylora.lifecycle.data.encoding import Encoded
from manylora.lifecycle.parameters import InvalidParameter
from manylora.lifecycle.tasks.encoders import found_of, load_headed, longest, padded
from manylora.lifecycle.tasks.interface import Measured, Metric, Numbers, Source, TaskBase
from manylora.lifecycle.train.objectives import Summed
from manylora.models import checkpoint
from manylora.models.loading import resolve_model

__all__ = ["Tagged", "Tagging", "spans"]

_NOTHING: Final = -100


@dataclass(frozen=True, slots=True)
class Tagged(Encoded):
    """`firsts`: of each word that there was room for, the place of its first token."""

    firsts: tuple[int, ...] = ()


class Tagging:
    """A label for each word. Implements `interface.Task`."""

    unit: Final = "word"
    lower: Final = frozenset[str]()

    def labels(self, dataset: Dataset) -> tuple[str, ...]:
        return dataset.labels

    def load(self, source: Source, labels: tuple[str, ...]) -> TaskBase:
        return load_headed(source, "token", "TOKEN_CLS", labels)

    def encode(self, dataset: Dataset, source: Source, max_length: int) -> list[Encoded]:
        """A text is its words with a space between each two; one that is too long is cut at its end."""
        tokenizer: Any = checkpoint.load_tokenizer(resolve_model(source.model))
        if not tokenizer.is_fast:
            raise InvalidParameter("`task` token needs a compiled tokenizer, which this base has none of.")
        most = longest(source, max_length)
        return [_encoded(tokenizer, example, most) for example in dataset.examples]

    def objective(self, model: Any, base: TaskBase) -> "Tags":
        return Tags(model, base)

    def measured(self, model: Any, base: TaskBase, examples: Sequence[Encoded]) -> Measured:
        """F1 of the runs of words that are named alike, as CoNLL counts them, and the words' accuracy.

        What was cut off counts as not found.
        """

        def taken(some: list[Encoded]) -> list[list[str]]:
            best = _logits(model, base, some)[0].argmax(-1).tolist()
            return [[base.labels[row[place]] for place in _firsts(each)] for row, each in zip(best, some, strict=True)]

        found = found_of(model, examples, taken)
        wanted = [each.example.tags for each in examples]
        right = [
            sum(a == b for a, b in zip(one, other, strict=False)) for one, other in zip(wanted, found, strict=True)
        ]
        words = np.array([len(each) for each in wanted])
        runs = [(set(spans(one)), set(spans(other))) for one, other in zip(wanted, found, strict=True)]
        counts = np.array([(len(one & other), len(one), len(other)) for one, other in runs])
        metrics: dict[str, Metric] = {
            "span_f1": lambda some: _f1(counts[some]),
            "accuracy": lambda some: float(np.array(right)[some].sum() / words[some].sum()),
        }
        return Measured(len(examples), metrics)


def spans(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Runs of words as (name, first, behind the last) of tags such as B-city, I-city and O, or city and O."""
    name, first = "O", 0
    for place, tag in enumerate([*tags, "O"]):
        mark, dash, rest = tag.partition("-")
        kind = rest if dash and mark in ("B", "I") else tag
        if name != "O" and (kind != name or (dash and mark == "B")):
            yield name, first, place
            name = "O"
        if kind != "O" and name == "O":
            name, first = kind, place


def _f1(counts: Numbers) -> float:
    right, wanted, found = counts.sum(axis=0).tolist()
    return 2 * right / (wanted + found) if wanted + found else 1.0


class Tags:
    """Implements `objectives.Objective`: mean negative log-likelihood of a word's label, in nats."""

    def __init__(self, model: Any, base: TaskBase) -> None:
        self._model = model
        self._base = base
        self._numbers = {label: number for number, label in enumerate(base.labels)}

    def weight(self, example: Encoded) -> int:
        return len(_firsts(example))

    def summed(self, examples: Sequence[Encoded]) -> Summed:
        logits, num_tokens = _logits(self._model, self._base, examples)
        wanted = torch.full(logits.shape[:2], _NOTHING)
        for row, each in enumerate(examples):
            for place, tag in zip(_firsts(each), each.example.tags, strict=False):
                wanted[row, place] = self._numbers[tag]
        flat = wanted.to(self._base.device).flatten()
        loss = functional.cross_entropy(logits.float().flatten(0, 1), flat, reduction="sum", ignore_index=_NOTHING)
        return Summed(loss, num_tokens)


def _firsts(example: Encoded) -> tuple[int, ...]:
    assert isinstance(example, Tagged), "the task encoded it"
    return example.firsts


def _encoded(tokenizer: Any, example: Example, most: int) -> Tagged:
    text = example.messages[0].content
    whole = len(tokenizer(text)["input_ids"])
    found = tokenizer(text, truncation=True, max_length=most, return_offsets_mapping=True)
    starts, at = {}, 0
    for number, word in enumerate(text.split(" ")):
        starts[at] = number
        at += len(word) + 1
    by_word: dict[int, int] = {}
    for place, (begin, end) in enumerate(found["offset_mapping"]):
        # Tokenizers with spaces in their tokens may count the one before a word as its own.
        start = begin + 1 if text[begin : begin + 1] == " " else begin
        if end > start and start in starts:
            by_word.setdefault(starts[start], place)
    firsts = tuple(by_word[number] for number in sorted(by_word))
    if sorted(by_word) != list(range(len(firsts))):
        raise InvalidParameter(f"`data`: row {example.row} has a word without tokens for this base.")
    if not firsts:
        raise InvalidParameter(f"`data`: row {example.row} has no tokens for this base.")
    ids = tuple(found["input_ids"])
    return Tagged(
        example, ids, tuple(place in firsts for place in range(len(ids))), num_cut=whole - len(ids), firsts=firsts
    )


def _logits(model: Any, base: TaskBase, examples: Sequence[Encoded]) -> tuple[torch.Tensor, int]:
    """Logits [texts, tokens, labels], and how many tokens they took."""
    ids, mask = padded(base, [each.ids for each in examples])
    return model(input_ids=ids, attention_mask=mask).logits, int(mask.sum())
