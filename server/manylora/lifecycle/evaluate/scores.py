"""Scores of answers, with what is needed to compare systems honestly: intervals and a paired test.

Every metric is a function of `Outcomes`, so the bootstrap (resample the examples) and the randomisation test
(swap two systems' answers example by example) work for all of them alike. Numpy only.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

OTHER = "(other)"
HIGHER_IS_BETTER = {
    "exact_match": True,
    "accuracy": True,
    "macro_precision": True,
    "macro_recall": True,
    "macro_f1": True,
    "mentioned": True,
    "valid_json": True,
    "perplexity": False,
}


@dataclass(frozen=True, slots=True)
class Outcomes:
    """One system on n examples, all arrays [n]: flags, class codes (`predicted` may be `num_classes`: other), nats."""

    exact: NDArray[np.bool_]
    mentioned: NDArray[np.bool_]
    valid_json: NDArray[np.bool_]
    gold: NDArray[np.int64]
    predicted: NDArray[np.int64]
    nll: NDArray[np.float64]
    tokens: NDArray[np.int64]
    num_classes: int

    def __len__(self) -> int:
        return len(self.exact)

    def take(self, index: NDArray[Any]) -> "Outcomes":
        return self._each(lambda a, _: a[index], self)

    def swapped(self, other: "Outcomes", where: NDArray[np.bool_]) -> "Outcomes":
        """Outcomes of one system, with another's at the places where `where` is true."""
        return self._each(lambda a, b: np.where(where, b, a), other)

    def _each(self, make: Callable[[Any, Any], Any], other: "Outcomes") -> "Outcomes":
        names = ("exact", "mentioned", "valid_json", "gold", "predicted", "nll", "tokens")
        arrays = {name: make(getattr(self, name), getattr(other, name)) for name in names}
        return Outcomes(num_classes=self.num_classes, **arrays)


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """`gain` > 0 means better than the reference, in the metric's own unit; `p` is two-sided."""

    metric: str
    gain: float
    p: float


def outcomes(
    golds: Sequence[str],
    answers: Sequence[str],
    *,
    labels: Sequence[str] = (),
    nll: Sequence[float] | None = None,
    tokens: Sequence[int] | None = None,
) -> Outcomes:
    """Score answers one by one. A label is predicted only by an answer that is that label and nothing else."""
    codes = {label: code for code, label in enumerate(labels)}
    count = len(golds)
    return Outcomes(
        exact=np.array([a.strip() == g.strip() for a, g in zip(answers, golds, strict=True)], dtype=bool),
        mentioned=np.array([_first_label(a, labels) == g for a, g in zip(answers, golds, strict=True)], dtype=bool),
        valid_json=np.array([_same_keys(a, g) for a, g in zip(answers, golds, strict=True)], dtype=bool),
        gold=np.array([codes.get(g, 0) for g in golds], dtype=np.int64),
        predicted=np.array([codes.get(a.strip(), len(labels)) for a in answers], dtype=np.int64),
        nll=np.zeros(count) if nll is None else np.array(nll, dtype=float),
        tokens=np.ones(count, dtype=np.int64) if tokens is None else np.array(tokens, dtype=np.int64),
        num_classes=len(labels),
    )


def metric_value(name: str, o: Outcomes) -> float:
    """One of `HIGHER_IS_BETTER`'s metrics. The macro ones are means over the classes that have examples."""
    if name == "perplexity":
        return math.exp(min(700.0, float(o.nll.sum() / o.tokens.sum())))
    if name.startswith("macro_"):
        has_examples = np.bincount(o.gold, minlength=o.num_classes) > 0
        return float(_by_class(name.removeprefix("macro_"), o)[has_examples].mean())
    flags = {"exact_match": o.exact, "mentioned": o.mentioned, "valid_json": o.valid_json}
    return float((o.gold == o.predicted).mean() if name == "accuracy" else flags[name].mean())


def bootstrap(name: str, o: Outcomes, *, seed: int, resamples: int = 1000) -> Interval:
    """The percentile interval over resampled examples."""
    random = np.random.default_rng(seed)
    values = [metric_value(name, o.take(random.integers(0, len(o), len(o)))) for _ in range(resamples)]
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(metric_value(name, o), float(low), float(high))


def paired_test(name: str, reference: Outcomes, candidate: Outcomes, *, seed: int, rounds: int = 2000) -> Comparison:
    """Approximate randomisation: how often does swapping answers at random give a difference as large?"""
    sign = 1.0 if HIGHER_IS_BETTER[name] else -1.0
    seen = metric_value(name, candidate) - metric_value(name, reference)
    random = np.random.default_rng(seed)
    as_large = 0
    for _ in range(rounds):
        where = random.random(len(reference)) < 0.5
        a = metric_value(name, candidate.swapped(reference, where))
        b = metric_value(name, reference.swapped(candidate, where))
        as_large += abs(a - b) >= abs(seen) - 1e-12
    return Comparison(name, sign * seen, (1 + as_large) / (1 + rounds))


def confusion(o: Outcomes) -> NDArray[np.int64]:
    """[gold, predicted], with one more column for answers that are no label."""
    table = np.zeros((o.num_classes, o.num_classes + 1), dtype=np.int64)
    np.add.at(table, (o.gold, o.predicted), 1)
    return table


def per_class(o: Outcomes, labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and number of examples of each label, by scikit-learn."""
    from sklearn.metrics import precision_recall_fscore_support

    codes = list(range(len(labels)))
    precision, recall, f1, support = precision_recall_fscore_support(
        o.gold, o.predicted, labels=codes, zero_division=0.0
    )
    return {
        label: {
            "precision": float(precision[c]),
            "recall": float(recall[c]),
            "f1": float(f1[c]),
            "support": int(support[c]),
        }
        for c, label in enumerate(labels)
    }


def _by_class(name: str, o: Outcomes) -> NDArray[np.float64]:
    """precision, recall or f1 of each class, 0 where it is not defined; [num_classes]."""
    width = o.num_classes + 1
    right = np.bincount(o.gold[o.gold == o.predicted], minlength=width)[:-1]
    wanted = np.bincount(o.gold, minlength=width)[:-1]
    said = np.bincount(o.predicted, minlength=width)[:-1]
    of = {"precision": 2 * said, "recall": 2 * wanted, "f1": said + wanted}[name]
    scores: NDArray[np.float64] = np.where(of > 0, 2 * right / np.maximum(of, 1), 0.0)
    return scores


def _first_label(answer: str, labels: Sequence[str]) -> str | None:
    """The label that a wordy answer names first: the kindest reading of a base that was not told to be brief."""
    places = {label: answer.lower().find(label.lower()) for label in labels}
    found = {label: place for label, place in places.items() if place >= 0}
    return min(found, key=lambda label: found[label]) if found else None


def _same_keys(answer: str, gold: str) -> bool:
    try:
        said, wanted = json.loads(answer), json.loads(gold)
    except ValueError:
        return False
    return isinstance(said, dict) and isinstance(wanted, dict) and list(said) == list(wanted)
