"""What `manylora train` is told, and its checks: everything that can be refused before a model is looked for."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from manylora.errors import InvalidRequest
from manylora.lifecycle.base import DeviceName, DtypeName
from manylora.lifecycle.data.data import Dataset, read_dataset
from manylora.lifecycle.data.encoding import Render
from manylora.lifecycle.output import refuse_existing
from manylora.lifecycle.progress import Listener, Progress
from manylora.lifecycle.train.checkpoint import discard_checkpoint
from manylora.lifecycle.train.training import Schedule


@dataclass(frozen=True, slots=True)
class LoraShape:
    """Which low-rank matrices there are. `alpha=None` means 2 × rank; no targets means every linear but the head."""

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ()
    dropout: float = 0.0
    rslora: bool = False


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Everything that decides the result; its JSON is kept in the report."""

    data: Path
    out: Path
    eval_data: Path | None = None
    base: str | None = None
    base_name: str | None = None
    lora: LoraShape = field(default_factory=LoraShape)
    schedule: Schedule = field(default_factory=Schedule)
    render: Render = "auto"
    instruction: str = ""
    max_length: int = 1024
    device: DeviceName = "auto"
    dtype: DtypeName = "auto"
    threads: int | None = None
    title: str = ""
    command: str = ""


def check_settings(lora: LoraShape, schedule: Schedule, max_length: int, threads: int | None) -> None:
    """Raises InvalidRequest for the first number that is out of range, by its flag."""
    positive = {
        "--rank": lora.rank, "--epochs": schedule.epochs, "--batch-size": schedule.batch_size,
        "--accumulate": schedule.accumulate, "--lr": schedule.lr, "--max-length": max_length,
        "--checkpoint-every": schedule.checkpoint_every, "--max-grad-norm": schedule.max_grad_norm,
        "--alpha": 1.0 if lora.alpha is None else lora.alpha, "--threads": 1 if threads is None else threads,
    }  # fmt: skip
    for flag, value in positive.items():
        if not (math.isfinite(value) and value > 0):
            raise InvalidRequest(f"{flag} must be positive, not {value}.")
    at_least_zero = {
        "--weight-decay": schedule.weight_decay, "--early-stop": schedule.early_stop,
        "--eval-every": schedule.eval_every, "--seed": schedule.seed,
    }  # fmt: skip
    for flag, value in at_least_zero.items():
        if not (math.isfinite(value) and value >= 0):
            raise InvalidRequest(f"{flag} must not be negative, and it is {value}.")
    if schedule.lr > 1:
        raise InvalidRequest(f"--lr must be at most 1, not {schedule.lr:g}: training would only diverge.")
    if schedule.seed >= 2**32:
        raise InvalidRequest(f"--seed must be below 2**32, not {schedule.seed}.")
    if not 0 <= schedule.warmup <= 1:
        raise InvalidRequest(f"--warmup is a share of the steps, from 0 to 1, not {schedule.warmup}.")
    if not 0 <= lora.dropout < 1:
        raise InvalidRequest(f"--dropout must be at least 0 and below 1, not {lora.dropout}.")


def check(config: TrainConfig, *, overwrite: bool, listen: Listener) -> tuple[Dataset, Dataset | None]:
    """The rows to learn from and those held out. Raises InvalidRequest for bad data or settings."""
    refuse_existing(config.out, overwrite=overwrite)
    check_settings(config.lora, config.schedule, config.max_length, config.threads)
    if config.schedule.early_stop and config.eval_data is None:
        raise InvalidRequest("--early-stop watches the evaluation loss: give --eval too.")
    train_set = read_dataset(config.data, min_labels=2)
    held_out = read_dataset(config.eval_data) if config.eval_data else None
    if held_out is None:
        return train_set, None
    if held_out.shape != train_set.shape:
        raise InvalidRequest(f"--eval has {held_out.shape} rows, --data has {train_set.shape} rows.")
    unseen = set(held_out.labels) - set(train_set.labels)
    if unseen:
        raise InvalidRequest(f"--eval has labels that --data lacks: {', '.join(sorted(unseen))}.")
    known = {example.messages for example in train_set.examples}
    shared = [example.row for example in held_out.examples if example.messages in known]
    if shared:
        message = (
            f"{len(shared)} of {len(held_out)} rows of --eval are in --data too (the first is row {shared[0]}): "
            "they say nothing about new data."
        )
        listen(Progress("warning", message=message))
    return train_set, held_out


def check_checkpoint(checkpoint: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises InvalidRequest when there is a checkpoint and no word about it, or none to resume."""
    if overwrite and not resume:
        discard_checkpoint(checkpoint)
    if checkpoint.exists() and not resume:
        raise InvalidRequest("An interrupted training of this --out exists. Give --resume, or --overwrite to drop it.")
    if resume and not checkpoint.exists():
        raise InvalidRequest("There is nothing to resume for this --out. Run without --resume.")
