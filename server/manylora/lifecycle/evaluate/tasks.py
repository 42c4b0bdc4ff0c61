"""Evaluation of adapters that do other things than to write: in this process, by the scores of their task."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from manylora.errors import InvalidRequest
from manylora.lifecycle.adapter_files import read_adapter_files
from manylora.lifecycle.base import memory_faults, quiet_peft
from manylora.lifecycle.data.batches import check_known
from manylora.lifecycle.data.data import Dataset, read_dataset
from manylora.lifecycle.data.encoding import Encoded, tell_lengths
from manylora.lifecycle.evaluate.config import EvaluateRequest
from manylora.lifecycle.evaluate.contenders import BASE
from manylora.lifecycle.extras import need
from manylora.lifecycle.output import atomic_folder, refuse_existing, write_json
from manylora.lifecycle.parameters import InvalidParameter
from manylora.lifecycle.progress import Listener, Progress
from manylora.lifecycle.tasks.interface import Measured, Metric, Source, TaskBase
from manylora.lifecycle.tasks.registry import TASKS
from manylora.lifecycle.train.config import check_rows

__all__ = ["run_task"]

_RESAMPLES: Final = 1000
_OF_WRITING: Final = (
    "server", "promote_if_better", "min_gain", "max_tokens", "render", "instruction", "tool_prompt", "resume",
)  # fmt: skip


def run_task(request: EvaluateRequest, folders: dict[str, Path], listen: Listener) -> dict[str, Any]:
    """The report of the adapters in `folders`, by name, and with `with_base` of the base; written to `out`, too.

    Raises InvalidRequest for bad input before any model is loaded.
    """
    dataset = _check(request, folders)
    task, source = TASKS[request.task], Source(request.model, None, request.device, request.dtype)
    examples = task.encode(dataset, source, request.max_length)
    tell_lengths("`data`", examples, listen)
    found: dict[str, Measured] = {}
    with memory_faults("Shorten `max_length`."):
        if request.with_base:
            base = task.load(source, task.labels(dataset))
            if not base.has_answers:
                raise InvalidParameter(
                    f"`with_base`: the bare base has no head, so it does not do `task` {request.task}."
                )
            found[BASE] = _measured(request, base, base.model, examples)
        for name, folder in folders.items():
            listen(Progress(f"{name}: scores", len(found), len(folders) + request.with_base))
            base = task.load(source, _labels(request, folder, dataset))
            found[name] = _measured(request, base, _adapted(base, folder), examples)
    report = _report(request, found)
    if request.out is not None:
        with atomic_folder(request.out) as draft:
            write_json(draft / "evaluate.json", report)
    return report


def _check(request: EvaluateRequest, folders: dict[str, Path]) -> Dataset:
    """The rows. Raises InvalidRequest for them, for folders, and for parameters that the task has no place for."""
    plain = EvaluateRequest(request.data)
    for name in _OF_WRITING:
        if getattr(request, name) != getattr(plain, name):
            raise InvalidParameter(f"`{name}` has no place in `task` {request.task}: it is of what writes.")
    if not folders and not request.with_base:
        raise InvalidParameter("Nothing to evaluate: give `adapters` or `with_base`.")
    if request.task == "image" and request.max_length != plain.max_length:
        raise InvalidParameter("`max_length` has no place in `task` image: images have no tokens.")
    if request.max_length <= 0:
        raise InvalidParameter(f"`max_length` must be positive, not {request.max_length}.")
    if not 0 <= request.seed < 2**32:
        raise InvalidParameter(f"`seed` must be from 0 to 2**32 - 1, not {request.seed}.")
    if request.out is not None:
        refuse_existing(request.out, overwrite=request.overwrite)
    need("peft", *(["sklearn"] if request.task in ("classify", "image") else []))
    dataset = read_dataset(request.data, reading=request.reading)
    check_rows("data", request.task, dataset.shape)
    for folder in folders.values():
        read_adapter_files(folder)
    return dataset


def _labels(request: EvaluateRequest, folder: Path, dataset: Dataset) -> tuple[str, ...]:
    """What the outputs of the folder's head mean. Raises InvalidParameter where the rows have other labels."""
    if not dataset.labels:
        return ()
    said = read_adapter_files(folder)[0].get("id2label")
    if not isinstance(said, dict) or sorted(said) != sorted(str(number) for number in range(len(said))):
        raise InvalidParameter(
            f"{folder}: its config has no id2label, so `task` {request.task} cannot score its labels."
        )
    labels = tuple(str(said[str(number)]) for number in range(len(said)))
    if strange := sorted(set(dataset.labels) - set(labels)):
        raise InvalidParameter(f"`data` has labels that {folder} lacks: {', '.join(strange)[:200]}.")
    return labels


def _adapted(base: TaskBase, folder: Path) -> Any:
    from peft import PeftModel

    said = read_adapter_files(folder)[0].get("task_type")
    if said != base.peft_task:
        raise InvalidParameter(f"{folder} is an adapter of {said}, and this is of {base.peft_task}. Give its `task`.")
    try:
        with quiet_peft():
            return PeftModel.from_pretrained(base.model, str(folder))
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise InvalidRequest(f"{folder} cannot be put on this base: {error}") from error


def _measured(request: EvaluateRequest, base: TaskBase, model: Any, examples: Sequence[Encoded]) -> Measured:
    check_known(examples, base.num_embeddings)
    found = TASKS[request.task].measured(model, base, examples)
    if strange := [name for name in request.metrics if name not in found.metrics]:
        raise InvalidParameter(f"`metrics`: {strange[0]!r} is not one of {', '.join(found.metrics)}.")
    return found


def _report(request: EvaluateRequest, found: dict[str, Measured]) -> dict[str, Any]:
    """As of what writes, with intervals, and each contender against the first."""
    reference = next(iter(found))
    first = found[reference]
    names = request.metrics or tuple(first.metrics)
    report: dict[str, Any] = {
        "data": request.data.name, "task": request.task, "num_examples": first.count, "labels": [],
        "metrics": list(names), "reference": reference, "contenders": {},
    }  # fmt: skip
    random = np.random.default_rng(request.seed)
    drawn = [random.integers(0, first.count, first.count) for _ in range(_RESAMPLES)]
    drawn_values = {
        name: {metric: _values(each.metrics[metric], drawn) for metric in names} for name, each in found.items()
    }
    lower = TASKS[request.task].lower
    for name, each in found.items():
        values, again = each.values(), drawn_values[name]
        entry: dict[str, Any] = {metric: _interval(values[metric], again[metric]) for metric in names}
        if name != reference:
            before = first.values()
            entry["against_reference"] = {
                metric: {
                    "metric": metric,
                    "gain": (values[metric] - before[metric]) * (-1 if metric in lower else 1),
                    "p": _chance(again[metric] - drawn_values[reference][metric]),
                }
                for metric in names
            }
        report["contenders"][name] = {**entry, **each.detail}
    return report


def _values(metric: Metric, drawn: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    return np.array([metric(some) for some in drawn])


def _interval(value: float, again: np.ndarray[Any, Any]) -> dict[str, float]:
    low, high = np.percentile(again, [2.5, 97.5])
    return {"value": value, "low": float(low), "high": float(high)}


def _chance(gains: np.ndarray[Any, Any]) -> float:
    """How often resampled examples, the same for both, turn the difference around, or leave none; for both sides."""
    aside = min(int((gains <= 0).sum()), int((gains >= 0).sum()))
    return min(1.0, 2 * (1 + aside) / (1 + len(gains)))
