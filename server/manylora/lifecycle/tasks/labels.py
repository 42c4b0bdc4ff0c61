"""Classifiers: a head of the rows' labels over an encoder or a decoder."""

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

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

__all__ = ["Labelling", "Labels", "TextEncoder", "label_scores"]

Logits: TypeAlias = Callable[[Any, TaskBase, Sequence[Encoded]], tuple[torch.Tensor, int]]
"""Of a model and examples the logits [examples, labels], and how many tokens they took."""


class TextEncoder:
    """Makes tokens of texts as the server does for `/v1/classify`. A text that is too long is cut at its end."""

    def __init__(self, model: str | None, *, max_length: int) -> None:
        self._tokenizer: Any = checkpoint.load_tokenizer(resolve_model(model))
        self._most = longest(Source(model), max_length)

    def encode(self, dataset: Dataset) -> list[Encoded]:
        """The first text of every row. Raises InvalidParameter for one without tokens."""
        return [self._encoded(example) for example in dataset.examples]

    def ids(self, text: str) -> tuple[list[int], int]:
        """A text's tokens, and how many were cut off."""
        whole = self._tokenizer(text)["input_ids"]
        kept = self._tokenizer(text, truncation=True, max_length=self._most)["input_ids"]
        return kept, len(whole) - len(kept)

    def _encoded(self, example: Example) -> Encoded:
        kept, num_cut = self.ids(example.messages[0].content)
        if not kept:
            raise InvalidParameter(f"`data`: row {example.row} has no tokens for this base.")
        return Encoded(example, tuple(kept), (*[False] * (len(kept) - 1), True), num_cut=num_cut)


class Labelling:
    """A label for each text. Implements `interface.Task`."""

    unit: Final = "label"
    lower: Final = frozenset[str]()

    def labels(self, dataset: Dataset) -> tuple[str, ...]:
        return dataset.labels

    def load(self, source: Source, labels: tuple[str, ...]) -> TaskBase:
        return load_headed(source, "classify", "SEQ_CLS", labels)

    def encode(self, dataset: Dataset, source: Source, max_length: int) -> list[Encoded]:
        return TextEncoder(source.model, max_length=max_length).encode(dataset)

    def objective(self, model: Any, base: TaskBase) -> "Labels":
        return Labels(model, base, _logits)

    def measured(self, model: Any, base: TaskBase, examples: Sequence[Encoded]) -> Measured:
        return label_scores(model, base, examples, _logits)


def label_scores(model: Any, base: TaskBase, examples: Sequence[Encoded], logits: Logits) -> Measured:
    """Accuracy, F1 and area under the curve as means of the labels, and how often each was taken for each."""
    from sklearn.metrics import confusion_matrix

    found = found_of(model, examples, lambda some: logits(model, base, some)[0].float().softmax(-1).tolist())
    shares = np.array(found)
    wanted = np.array([base.labels.index(str(each.example.label)) for each in examples])
    taken = shares.argmax(1)
    count = len(base.labels)
    detail = {
        "f1": dict(zip(base.labels, map(float, _f1(wanted, taken, count)), strict=True)),
        "confusion": confusion_matrix(wanted, taken, labels=range(count)).tolist(),
    }
    metrics: dict[str, Metric] = {
        "accuracy": lambda some: float((wanted[some] == taken[some]).mean()),
        "macro_f1": lambda some: float(_f1(wanted[some], taken[some], count).mean()),
        "auc": lambda some: _auc(wanted[some], shares[some]),
    }
    return Measured(len(examples), metrics, detail)


def _f1(wanted: Numbers, taken: Numbers, count: int) -> np.ndarray[Any, Any]:
    """Each label's, 0 where it is not defined."""
    right = np.bincount(wanted[wanted == taken], minlength=count)
    said = np.bincount(wanted, minlength=count) + np.bincount(taken, minlength=count)
    scores: np.ndarray[Any, Any] = np.where(said > 0, 2 * right / np.maximum(said, 1), 0.0)
    return scores


def _auc(wanted: Numbers, shares: np.ndarray[Any, Any]) -> float:
    """Mean over the labels of how often a text of the label has the greater share of it than one of another."""
    from scipy.stats import rankdata

    found = []
    for number in range(shares.shape[1]):
        is_it = wanted == number
        ours, others = int(is_it.sum()), int((~is_it).sum())
        if ours and others:
            ranks = rankdata(shares[:, number])[is_it].sum()
            found.append((ranks - ours * (ours + 1) / 2) / (ours * others))
    return float(np.mean(found)) if found else 0.5


class Labels:
    """Implements `objectives.Objective`: mean negative log-likelihood of an example's label, in nats."""

    def __init__(self, model: Any, base: TaskBase, logits: Logits) -> None:
        self._model = model
        self._base = base
        self._logits = logits
        self._numbers = {label: number for number, label in enumerate(base.labels)}

    def weight(self, _example: Encoded) -> int:
        return 1

    def summed(self, examples: Sequence[Encoded]) -> Summed:
        logits, num_tokens = self._logits(self._model, self._base, examples)
        numbers = [self._numbers[str(each.example.label)] for each in examples]
        wanted = torch.tensor(numbers, device=self._base.device)
        return Summed(functional.cross_entropy(logits.float(), wanted, reduction="sum"), num_tokens)


def _logits(model: Any, base: TaskBase, examples: Sequence[Encoded]) -> tuple[torch.Tensor, int]:
    """Logits [texts, labels], and how many tokens they took."""
    ids, mask = padded(base, [each.ids for each in examples])
    return model(input_ids=ids, attention_mask=mask).logits, int(mask.sum())
