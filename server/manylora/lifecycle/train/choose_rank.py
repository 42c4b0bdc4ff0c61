"""`manylora choose-rank`: cross-validation over ranks and targets, and the smallest that is as good as the best."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from manylora.lifecycle.base import Base, memory_faults
from manylora.lifecycle.data.batches import check_known
from manylora.lifecycle.data.data import Dataset, Reading, read_dataset
from manylora.lifecycle.data.encoding import Encoded, tell_lengths
from manylora.lifecycle.data.rows import LABELLED
from manylora.lifecycle.extras import decoration, need
from manylora.lifecycle.journal import Journal
from manylora.lifecycle.output import atomic_file, atomic_folder, checkpoint_path, refuse_existing, write_json
from manylora.lifecycle.parameters import InvalidParameter
from manylora.lifecycle.plots import rank_curve
from manylora.lifecycle.progress import Listener, Progress, ignore
from manylora.lifecycle.train.config import ChooseConfig, LoraShape, check_rows, check_settings, check_shape, check_task
from manylora.lifecycle.train.train import (
    MEMORY_ADVICE,
    TrainResult,
    add_lora,
    encode_rows,
    load_for,
    objective_of,
    train,
    unit_of,
)
from manylora.lifecycle.train.training import Trainer

_BASE: Final = "base"
_NOTHING_LEARNT: Final = (
    "Nothing was learnt that holds for rows held out: the bare base's loss is {base:.4f}, and the best shape's is not "
    "lower by more than its standard error, so the ranks say nothing. Raise `lr` or `epochs`, or look at the data."
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One shape's held-out losses, fold by fold, in nats per answer token."""

    shape: LoraShape
    size_bytes: int
    losses: tuple[float, ...] = field(default=())

    @property
    def mean(self) -> float:
        return float(np.mean(self.losses))

    @property
    def standard_error(self) -> float:
        return float(np.std(self.losses, ddof=1) / math.sqrt(len(self.losses)))


def choose_rank(
    config: ChooseConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    listen: Listener = ignore,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, Any] | None, TrainResult | None]:
    """The report (None after an interruption) and the final training (None unless asked for).

    Raises InvalidRequest for bad input before the model is loaded.
    """
    need("peft", "sklearn", "matplotlib")
    dataset = _check(config, resume=resume, overwrite=overwrite)
    out = config.training.out
    kept = out.parent / f".{out.name}.ranks.json"
    journal = Journal(kept, _fingerprint(config, dataset), resume=resume, overwrite=overwrite, what="search")
    candidates = _candidates(config, dataset, journal, listen, should_stop)
    if candidates is None:
        return None, None
    chosen = one_standard_error(candidates)
    report = _report(config, dataset, candidates, chosen) | {"base_loss": journal.results[_BASE]}
    if not has_learnt(candidates, report["base_loss"]):
        listen(Progress("warning", message=_NOTHING_LEARNT.format(base=report["base_loss"])))
    with atomic_folder(ranks_folder(out)) as draft:
        write_json(draft / "ranks.json", report)
    with decoration("The curve of ranks", listen), atomic_file(ranks_folder(out) / "ranks.png") as draft:
        rank_curve(draft, report["candidates"], report["chosen"])
    trained = None
    if config.train_final:
        final = replace(config.training, lora=chosen.shape)
        going_on = resume and checkpoint_path(final.out).exists()
        trained = train(final, resume=going_on, overwrite=overwrite, listen=listen, should_stop=should_stop)
    if trained is None or trained.finished:
        journal.discard()
    return report, trained


def ranks_folder(out: Path) -> Path:
    """Where table and plot go: beside the final adapter's place."""
    return out.parent / f"{out.name}.ranks"


def _candidates(
    config: ChooseConfig, dataset: Dataset, journal: Journal, listen: Listener, should_stop: Callable[[], bool]
) -> list[Candidate] | None:
    training = config.training
    encoded = encode_rows(training, dataset)
    tell_lengths("`data`", encoded, listen)
    if training.threads:
        torch.set_num_threads(training.threads)
    base = load_for(training, dataset)
    check_known(encoded, base.num_embeddings)
    with memory_faults(MEMORY_ADVICE):
        return _cross_validate(config, base, encoded, journal, listen, should_stop)


def one_standard_error(candidates: Sequence[Candidate]) -> Candidate:
    """The smallest candidate whose mean loss is within one standard error of the best one's."""
    best = min(candidates, key=lambda c: c.mean)
    good = [c for c in candidates if c.mean <= best.mean + best.standard_error]
    return min(good, key=lambda c: (c.size_bytes, c.mean))


def has_learnt(candidates: Sequence[Candidate], base_loss: float) -> bool:
    """Whether any shape's held-out loss is below the bare base's by more than its standard error."""
    return any(one.mean + one.standard_error < base_loss for one in candidates)


def split_folds(examples: Sequence[Encoded], folds: int, seed: int) -> list[np.ndarray[Any, Any]]:
    """Indices of each fold's held-out examples; with labels, each fold has its share of every label."""
    from sklearn.model_selection import KFold, StratifiedKFold

    labels = [e.example.label for e in examples]
    kind = KFold if None in labels else StratifiedKFold
    splits = kind(n_splits=folds, shuffle=True, random_state=seed).split(np.zeros(len(labels)), labels)
    return [held_out for _, held_out in splits]


def _cross_validate(
    config: ChooseConfig,
    base: Base,
    encoded: Sequence[Encoded],
    journal: Journal,
    listen: Listener,
    should_stop: Callable[[], bool],
) -> list[Candidate] | None:
    folds = split_folds(encoded, config.folds, config.training.schedule.seed)
    if _BASE not in journal.results:
        journal.add(_BASE, _base_loss(config, base, encoded, folds))
    done, total = 0, len(config.shapes) * len(folds)
    candidates, seconds = [], []
    for shape in config.shapes:
        losses, size = [], 0
        for number, held_out in enumerate(folds):
            key = json.dumps([asdict(shape), number])
            if key not in journal.results:
                started = time.monotonic()
                found = _one_fold(config, base, encoded, held_out, shape, should_stop)
                if found is None:
                    return None
                seconds.append(time.monotonic() - started)
                journal.add(key, found)
            loss, size = journal.results[key][0], int(journal.results[key][1])
            losses.append(loss)
            done += 1
            values = {"loss": loss}
            if seconds:
                values["remaining_s"] = sum(seconds) / len(seconds) * (total - done)
            listen(Progress("cross-validate", done, total, values=values))
        candidates.append(Candidate(shape, size, tuple(losses)))
    return candidates


def _base_loss(
    config: ChooseConfig, base: Base, encoded: Sequence[Encoded], folds: Sequence[np.ndarray[Any, Any]]
) -> float:
    """The mean over the folds, as a candidate's: of matrices that were not trained, with which a model is the base."""
    model = add_lora(base, config.shapes[0])
    try:
        objective = objective_of(config.training, model, base)
        trainer = Trainer(model, base, encoded, [], config.training.schedule, objective)
        return float(np.mean([trainer.evaluation_loss([encoded[i] for i in held_out]) for held_out in folds]))
    finally:
        model.unload()


def _one_fold(
    config: ChooseConfig,
    base: Base,
    encoded: Sequence[Encoded],
    held_out: np.ndarray[Any, Any],
    shape: LoraShape,
    should_stop: Callable[[], bool],
) -> tuple[float, int] | None:
    """(held-out loss, bytes in bfloat16) of one training, or None when it was told to stop."""
    out = set(held_out.tolist())
    rows = [e for i, e in enumerate(encoded) if i not in out]
    torch.manual_seed(config.training.schedule.seed)
    model = add_lora(base, shape)
    try:
        schedule = replace(config.training.schedule, early_stop=0)
        trainer = Trainer(model, base, rows, [], schedule, objective_of(config.training, model, base))
        if not trainer.run(ignore, should_stop, lambda: None):
            return None
        size = 2 * sum(p.numel() for p in trainer.parameters.values())
        return trainer.evaluation_loss([encoded[i] for i in held_out]), size
    finally:
        model.unload()


def _check(config: ChooseConfig, *, resume: bool, overwrite: bool) -> Dataset:
    if not config.ranks or min(config.ranks) < 1 or len(set(config.ranks)) != len(config.ranks):
        raise InvalidParameter("`ranks` must be different numbers from 1 up, as in 1,2,4,8.")
    if config.folds < 2:
        raise InvalidParameter(f"`folds` must be at least 2, not {config.folds}.")
    training = config.training
    check_settings(training.lora, training.schedule, training.max_length, training.threads)
    # an interrupted final training comes after the table was written
    refuse_existing(ranks_folder(training.out), overwrite=overwrite or resume)
    if config.train_final:
        refuse_existing(training.out, overwrite=overwrite)
    dataset = read_dataset(training.data, min_labels=2, reading=training.reading)
    check_rows("data", training.task, dataset.shape)
    check_shape("supervised", dataset.shape)
    check_task(training)
    labels = dataset.labels if dataset.shape in LABELLED else ()
    smallest = min((sum(e.label == label for e in dataset.examples) for label in labels), default=len(dataset))
    if smallest < config.folds:
        raise InvalidParameter(
            f"`folds` {config.folds} needs that many examples (of every label); there are {smallest}."
        )
    return dataset


def _fingerprint(config: ChooseConfig, dataset: Dataset) -> str:
    training = config.training
    parts = [asdict(training.schedule), training.instruction, training.render, config.folds]
    if training.reading != Reading() or training.tool_prompt:
        parts.append([asdict(training.reading), training.tool_prompt])
    if training.task != "generate":
        parts.append(training.task)
    text = json.dumps([*parts, training.max_length, training.dtype, training.base], sort_keys=True)
    digest = hashlib.sha256(text.encode())
    for part in dataset.contents():
        digest.update(part)
    return digest.hexdigest()


def _report(
    config: ChooseConfig, dataset: Dataset, candidates: Sequence[Candidate], chosen: Candidate
) -> dict[str, Any]:
    rows = [
        {
            "rank": c.shape.rank,
            "targets": list(c.shape.targets),
            "size_bytes": c.size_bytes,
            "losses": list(c.losses),
            "mean": c.mean,
            "standard_error": c.standard_error,
        }
        for c in candidates
    ]
    return {
        "data": config.training.data.name,
        "num_examples": len(dataset),
        "folds": config.folds,
        "schedule": asdict(config.training.schedule),
        "score": f"held-out loss in nats per {unit_of(config.training)}",
        "rule": "one standard error",
        "candidates": rows,
        "chosen": rows[list(candidates).index(chosen)],
    }
