"""`manylora evaluate`: several contenders on one file, side by side, with intervals and a paired test."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from manylora.errors import InvalidRequest
from manylora.lifecycle.contenders import Contenders
from manylora.lifecycle.data import Dataset, read_dataset
from manylora.lifecycle.encoding import Encoded
from manylora.lifecycle.output import atomic_folder, write_json
from manylora.lifecycle.plots import confusion_matrix
from manylora.lifecycle.progress import Listener, Progress, ignore
from manylora.lifecycle.scores import (
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

SIGNIFICANT = 0.05


@dataclass(frozen=True, slots=True)
class EvaluateConfig:
    """`metrics` empty means those that fit the data. Comparisons are against the first contender."""

    data: Path
    metrics: tuple[str, ...] = ()
    max_tokens: int = 64
    seed: int = 0
    out: Path | None = None


def evaluation_data(path: Path, metrics: Sequence[str]) -> tuple[Dataset, tuple[str, ...]]:
    """The checked file and the metrics to compute. Raises InvalidRequest for unknown or unfitting metrics."""
    dataset = read_dataset(path)
    fitting = ["exact_match", "valid_json", "perplexity"]
    if dataset.shape == "label":
        fitting = ["accuracy", "macro_f1", "mentioned", "exact_match", "perplexity"]
    for metric in metrics:
        if metric not in HIGHER_IS_BETTER:
            raise InvalidRequest(f"--metrics: {metric!r} is not one of {', '.join(HIGHER_IS_BETTER)}.")
        if metric not in fitting:
            raise InvalidRequest(f"--metrics: {metric} needs rows of text and label, {path.name} has none.")
    default = ["accuracy", "macro_f1", "perplexity"] if dataset.shape == "label" else ["exact_match", "perplexity"]
    return dataset, tuple(metrics or default)


def evaluate(
    config: EvaluateConfig,
    dataset: Dataset,
    encoded: Sequence[Encoded],
    contenders: Contenders,
    metrics: Sequence[str],
    listen: Listener = ignore,
) -> dict[str, Any]:
    """Run every contender over the examples; the report, also written to `config.out` with the pictures."""
    if not contenders.names:
        raise InvalidRequest("Nothing to evaluate: give --adapter or --base.")
    golds = [e.example.answer for e in encoded]
    results, answers = {}, {}
    for name in contenders.names:
        results[name], answers[name] = _run(config, dataset, encoded, contenders, name, metrics, listen)
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
        _write(config.out, report, results, dataset.labels)
    return report


def comparison(report: dict[str, Any], name: str, metric: str) -> Comparison:
    """A contender against the reference, out of a report."""
    return Comparison(**report["contenders"][name]["against_reference"][metric])


def deserves_promotion(test: Comparison, min_gain: float) -> bool:
    """Better by at least `min_gain` and not by chance."""
    return test.gain >= min_gain and test.gain > 0 and test.p < SIGNIFICANT


def _run(
    config: EvaluateConfig,
    dataset: Dataset,
    encoded: Sequence[Encoded],
    contenders: Contenders,
    name: str,
    metrics: Sequence[str],
    listen: Listener,
) -> tuple[Outcomes, list[str]]:
    def tick(done: int) -> None:
        listen(Progress(name, done, total))

    golds = [e.example.answer for e in encoded]
    total = len(encoded)
    answers = [""] * total
    if set(metrics) != {"perplexity"}:
        answers = contenders.answers(name, encoded, config.max_tokens, tick)
    nll = contenders.nll(name, encoded, tick) if "perplexity" in metrics else None
    tokens = [e.num_answer_tokens for e in encoded]
    return outcomes(golds, answers, labels=dataset.labels, nll=nll, tokens=tokens), answers


def _write(out: Path, report: dict[str, Any], results: dict[str, Outcomes], labels: Sequence[str]) -> None:
    with atomic_folder(out) as draft:
        write_json(draft / "evaluate.json", report)
        if labels:
            for name, result in results.items():
                picture = draft / f"confusion-{name.replace('/', '_').replace('@', '-v')}.png"
                confusion_matrix(picture, confusion(result), list(labels), [*labels, OTHER], name)
