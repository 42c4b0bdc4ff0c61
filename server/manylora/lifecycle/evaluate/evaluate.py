"""`manylora evaluate`: several contenders on one file, side by side, with intervals and a paired test."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from manylora.errors import ManyloraError
from manylora.lifecycle.data.data import Dataset, read_dataset
from manylora.lifecycle.data.encoding import Encoded
from manylora.lifecycle.data.files import AS_IT_IS, Reading
from manylora.lifecycle.evaluate.contenders import Contenders, Tick
from manylora.lifecycle.evaluate.scores import (
    HIGHER_IS_BETTER,
    OTHER,
    Comparison,
    Outcomes,
    bootstrap,
    confusion,
    outcomes,
    paired_test,
    per_class,
)
from manylora.lifecycle.extras import decoration
from manylora.lifecycle.journal import Journal
from manylora.lifecycle.output import atomic_file, atomic_folder, write_json
from manylora.lifecycle.parameters import InvalidParameter
from manylora.lifecycle.plots import confusion_matrix
from manylora.lifecycle.progress import Listener, Progress, ignore
from manylora.lifecycle.train.config import check_rows

SIGNIFICANT = 0.05
_OF_LABELS = ("accuracy", "macro_precision", "macro_recall", "macro_f1")


@dataclass(frozen=True, slots=True)
class EvaluateConfig:
    """`metrics` empty means those that fit the data. Comparisons are against the first contender."""

    data: Path
    metrics: tuple[str, ...] = ()
    max_tokens: int = 64
    seed: int = 0
    out: Path | None = None


def evaluation_data(path: Path, metrics: Sequence[str], reading: Reading = AS_IT_IS) -> tuple[Dataset, tuple[str, ...]]:
    """The checked file and the metrics to compute. Raises InvalidRequest for unknown or unfitting metrics."""
    dataset = read_dataset(path, reading=reading)
    check_rows("data", "generate", dataset.shape)
    fitting = ["exact_match", "valid_json", "perplexity"]
    if dataset.shape == "label":
        fitting = [*_OF_LABELS, "mentioned", "exact_match", "perplexity"]
    has_calls = any(example.messages[-1].calls for example in dataset.examples)
    if has_calls:  # which the base writes in a notation of its own
        fitting = ["perplexity"]
    for metric in metrics:
        if metric not in HIGHER_IS_BETTER:
            raise InvalidParameter(f"`metrics`: {metric!r} is not one of {', '.join(HIGHER_IS_BETTER)}.")
        if metric not in fitting:
            needed = "rows of text and label" if metric != "valid_json" else "rows whose answers are JSON, not labels"
            needed = "rows whose answers are text, not calls" if has_calls else needed
            raise InvalidParameter(f"`metrics`: {metric} needs {needed}, {path.name} has none.")
    default = [*_OF_LABELS, "perplexity"] if dataset.shape == "label" else ["exact_match", "perplexity"]
    return dataset, tuple(metrics or (fitting if has_calls else default))


def evaluate(
    config: EvaluateConfig,
    dataset: Dataset,
    encoded: Sequence[Encoded],
    contenders: Contenders,
    metrics: Sequence[str],
    journal: Journal,
    listen: Listener = ignore,
) -> dict[str, Any]:
    """Run every contender over the examples; the report, also written to `config.out` with the pictures.

    What the journal has is not run again. Raises ManyloraError when a contender's likelihoods are no numbers.
    """
    golds = [e.example.answer for e in encoded]
    results, answers = {}, {}
    for name in contenders.names:
        answers[name], nll = _run(config, encoded, contenders, name, metrics, journal, listen)
        tokens = [e.num_answer_tokens for e in encoded]
        results[name] = outcomes(golds, answers[name], labels=dataset.labels, nll=nll, tokens=tokens)
    reference = contenders.names[0]
    report: dict[str, Any] = {
        "data": config.data.name,
        "num_examples": len(encoded),
        "labels": list(dataset.labels),
        "metrics": list(metrics),
        "reference": reference,
        "contenders": {},
    }
    for name, result in results.items():
        entry: dict[str, Any] = {m: asdict(bootstrap(m, result, seed=config.seed)) for m in metrics}
        if dataset.labels:
            entry["per_class"] = per_class(result, dataset.labels)
            entry["confusion"] = confusion(result).tolist()
        if name != reference:
            tests = (paired_test(m, results[reference], result, seed=config.seed) for m in metrics)
            entry["against_reference"] = {test.metric: asdict(test) for test in tests}
        entry["answers"] = answers[name]
        report["contenders"][name] = entry
    report["gold"] = golds
    report["prompts"] = [e.example.prompt[-1].content for e in encoded]
    report["max_tokens"] = config.max_tokens
    if config.out is not None:
        _write(config.out, report, results, dataset.labels, listen)
    return report


def comparison(report: dict[str, Any], name: str, metric: str) -> Comparison:
    """A contender against the reference, out of a report."""
    return Comparison(**report["contenders"][name]["against_reference"][metric])


def deserves_promotion(test: Comparison, min_gain: float) -> bool:
    """Better by at least `min_gain` and not by chance."""
    return test.gain >= min_gain and test.gain > 0 and test.p < SIGNIFICANT


def _run(
    config: EvaluateConfig,
    encoded: Sequence[Encoded],
    contenders: Contenders,
    name: str,
    metrics: Sequence[str],
    journal: Journal,
    listen: Listener,
) -> tuple[list[str], list[float] | None]:
    """One contender's answers and, where perplexity is asked for, the likelihoods of the right answers."""

    def telling(what: str) -> Tick:
        return lambda done: listen(Progress(f"{name}: {what}", done, len(encoded)))

    answers = [""] * len(encoded)
    if set(metrics) != {"perplexity"}:
        if f"{name}/answers" not in journal.results:
            journal.add(f"{name}/answers", contenders.answers(name, encoded, config.max_tokens, telling("answers")))
        answers = journal.results[f"{name}/answers"]
    if "perplexity" not in metrics:
        return answers, None
    if f"{name}/nll" not in journal.results:
        found = contenders.nll(name, encoded, telling("likelihoods"))
        wrong = [e.example.row for e, value in zip(encoded, found, strict=True) if not math.isfinite(value)]
        if wrong:
            raise ManyloraError(f"{name} gives no finite likelihood for row {wrong[0]} ({len(wrong)} rows in all).")
        journal.add(f"{name}/nll", found)
    return answers, journal.results[f"{name}/nll"]


def _write(
    out: Path, report: dict[str, Any], results: dict[str, Outcomes], labels: Sequence[str], listen: Listener
) -> None:
    with atomic_folder(out) as folder:
        write_json(folder / "evaluate.json", report)
    for name, result in results.items() if labels else ():
        picture = out / f"confusion-{name.replace('/', '_').replace('@', '-v')}.png"
        with decoration(f"The confusion matrix of {name}", listen), atomic_file(picture) as draft:
            confusion_matrix(draft, confusion(result), list(labels), [*labels, OTHER], name)
