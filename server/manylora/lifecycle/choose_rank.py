"""`manylora choose-rank`: cross-validation over ranks and targets, and the smallest that is as good as the best."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from manylora.errors import InvalidRequest
from manylora.lifecycle.base import Base, load_base
from manylora.lifecycle.data import Dataset, read_dataset
from manylora.lifecycle.encoding import Encoded, Encoder
from manylora.lifecycle.output import atomic_folder, refuse_existing, write_json
from manylora.lifecycle.plots import rank_curve
from manylora.lifecycle.progress import Listener, Progress, ignore
from manylora.lifecycle.train import LoraShape, TrainConfig, TrainResult, add_lora, report_folder, train
from manylora.lifecycle.training import Trainer


@dataclass(frozen=True, slots=True)
class ChooseConfig:
    """`training` holds the data and everything but the rank; its `out` is where the final adapter goes.

    `targets` are the sets of linears to compare; empty: the training's own.
    """

    training: TrainConfig
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    folds: int = 5
    targets: tuple[tuple[str, ...], ...] = ()
    train_final: bool = False

    @property
    def shapes(self) -> list[LoraShape]:
        sets = self.targets or (self.training.lora.targets,)
        return [replace(self.training.lora, rank=rank, targets=names) for names in sets for rank in sorted(self.ranks)]


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
    out = config.training.out
    dataset = _check(config, overwrite=overwrite)
    progress = _Journal(out, _fingerprint(config), resume=resume, overwrite=overwrite)
    base = load_base(
        config.training.base, name=config.training.base_name, device=config.training.device,
        dtype=config.training.dtype, max_length=config.training.max_length,
    )  # fmt: skip
    encoder = Encoder(
        base.tokenizer, render=config.training.render, instruction=config.training.instruction,
        max_length=config.training.max_length,
    )  # fmt: skip
    encoded = encoder.encode(dataset, context_length=base.context_length)
    candidates = _cross_validate(config, base, encoded, progress, listen, should_stop)
    if candidates is None:
        return None, None
    chosen = one_standard_error(candidates)
    report = _report(candidates, chosen)
    with atomic_folder(out.parent / f"{out.name}.ranks") as draft:
        write_json(draft / "ranks.json", report)
        rank_curve(draft / "ranks.png", report["candidates"], report["chosen"])
    progress.discard()
    if not config.train_final:
        return report, None
    final = replace(config.training, lora=chosen.shape)
    return report, train(final, overwrite=overwrite, listen=listen, should_stop=should_stop)


def one_standard_error(candidates: Sequence[Candidate]) -> Candidate:
    """The smallest candidate whose mean loss is within one standard error of the best one's."""
    best = min(candidates, key=lambda c: c.mean)
    good = [c for c in candidates if c.mean <= best.mean + best.standard_error]
    return min(good, key=lambda c: (c.size_bytes, c.mean))


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
    progress: "_Journal",
    listen: Listener,
    should_stop: Callable[[], bool],
) -> list[Candidate] | None:
    folds = split_folds(encoded, config.folds, config.training.schedule.seed)
    done, total = 0, len(config.shapes) * len(folds)
    candidates = []
    for shape in config.shapes:
        losses, size = [], 0
        for number, held_out in enumerate(folds):
            key = json.dumps([asdict(shape), number])
            if key not in progress.results:
                found = _one_fold(config, base, encoded, held_out, shape, should_stop)
                if found is None:
                    return None
                progress.add(key, found)
            loss, size = progress.results[key][0], int(progress.results[key][1])
            losses.append(loss)
            done += 1
            message = f"{_name(shape)}: loss {np.mean(losses):.4f}" if number == len(folds) - 1 else ""
            listen(Progress("cross-validate", done, total, message, {"loss": loss}))
        candidates.append(Candidate(shape, size, tuple(losses)))
    return candidates


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
        trainer = Trainer(model, base, rows, [], replace(config.training.schedule, early_stop=0))
        if not trainer.run(ignore, should_stop, lambda: None):
            return None
        size = 2 * sum(p.numel() for p in trainer.parameters.values())
        return trainer.evaluation_loss([encoded[i] for i in held_out]), size
    finally:
        model.unload()


class _Journal:
    """Results of finished folds on disk, so that an interrupted search goes on where it stopped."""

    def __init__(self, out: Path, fingerprint: str, *, resume: bool, overwrite: bool) -> None:
        self._path = out.parent / f".{out.name}.ranks.json"
        self._fingerprint = fingerprint
        self.results: dict[str, tuple[float, int]] = {}
        if self._path.exists() and not resume and not overwrite:
            raise InvalidRequest(
                "An interrupted search for this --out exists: give --resume, or --overwrite to drop it."
            )
        if resume:
            self._read()

    def add(self, key: str, result: tuple[float, int]) -> None:
        self.results[key] = result
        write_json(self._path, {"fingerprint": self._fingerprint, "results": self.results})

    def discard(self) -> None:
        self._path.unlink(missing_ok=True)

    def _read(self) -> None:
        if not self._path.exists():
            raise InvalidRequest("There is nothing to resume for this --out. Run without --resume.")
        state = json.loads(self._path.read_text(encoding="utf-8"))
        if state["fingerprint"] != self._fingerprint:
            raise InvalidRequest("The interrupted search used other data or settings. Resume it with those.")
        self.results = {key: (float(loss), int(size)) for key, (loss, size) in state["results"].items()}


def _check(config: ChooseConfig, *, overwrite: bool) -> Dataset:
    if not config.ranks or min(config.ranks) < 1 or len(set(config.ranks)) != len(config.ranks):
        raise InvalidRequest("--ranks must be different numbers from 1 up, as in 1,2,4,8.")
    if config.folds < 2:
        raise InvalidRequest(f"--folds must be at least 2, not {config.folds}.")
    out = config.training.out
    refuse_existing(out.parent / f"{out.name}.ranks", overwrite=overwrite)
    if config.train_final:
        refuse_existing(out, overwrite=overwrite)
        refuse_existing(report_folder(out), overwrite=overwrite)
    dataset = read_dataset(config.training.data, min_labels=2)
    smallest = min((sum(e.label == label for e in dataset.examples) for label in dataset.labels), default=len(dataset))
    if smallest < config.folds:
        raise InvalidRequest(f"--folds {config.folds} needs that many examples (of every label); there are {smallest}.")
    return dataset


def _fingerprint(config: ChooseConfig) -> str:
    parts = [asdict(config.training.schedule), config.training.instruction, config.training.render, config.folds]
    text = json.dumps([*parts, config.training.max_length, config.training.dtype], sort_keys=True)
    return hashlib.sha256(text.encode() + config.training.data.read_bytes()).hexdigest()


def _name(shape: LoraShape) -> str:
    return f"rank {shape.rank}" + (f" on {','.join(shape.targets)}" if shape.targets else "")


def _report(candidates: Sequence[Candidate], chosen: Candidate) -> dict[str, Any]:
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
    return {"candidates": rows, "chosen": rows[list(candidates).index(chosen)], "rule": "one standard error"}
