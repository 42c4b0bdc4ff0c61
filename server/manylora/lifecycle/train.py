"""`manylora train`: data in, an adapter in PEFT layout out, with its loss curve, report and card."""

import hashlib
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from manylora.errors import InvalidRequest
from manylora.lifecycle.adapter_files import plain_config, write_adapter
from manylora.lifecycle.base import Base, DeviceName, DtypeName, load_base
from manylora.lifecycle.card import Card, write_card
from manylora.lifecycle.checkpoint import checkpoint_folder, discard_checkpoint, load_checkpoint, save_checkpoint
from manylora.lifecycle.data import Dataset, read_dataset
from manylora.lifecycle.encoding import Encoded, Encoder, Render, length_statistics
from manylora.lifecycle.output import atomic_folder, refuse_existing, write_json
from manylora.lifecycle.plots import loss_curve
from manylora.lifecycle.progress import Listener, Progress, ignore
from manylora.lifecycle.training import Schedule, Trainer

REPORT = "train.json"
CURVE = "loss.png"


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


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What came out. `finished` is False after an interruption; then only the checkpoint exists."""

    finished: bool
    out: Path
    report: dict[str, Any]


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    listen: Listener = ignore,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train an adapter and write it to `config.out`, whole or not at all.

    All input is checked before the model is loaded. Raises InvalidRequest for bad data or settings,
    ManyloraError when training diverges or the disk is full.
    """
    train_set, held_out = _check(config, overwrite=overwrite)
    checkpoint = checkpoint_folder(config.out)
    _check_checkpoint(checkpoint, resume=resume, overwrite=overwrite)
    if config.threads:
        torch.set_num_threads(config.threads)
    base = load_base(
        config.base, name=config.base_name, device=config.device, dtype=config.dtype, max_length=config.max_length
    )
    trainer, lengths = prepare(config, base, train_set, held_out, listen)
    fingerprint = _fingerprint(config)
    if resume:
        load_checkpoint(checkpoint, trainer, fingerprint)
    finished = trainer.run(listen, should_stop, lambda: save_checkpoint(checkpoint, trainer, fingerprint))
    report = _report(config, base, trainer, lengths, train_set, held_out)
    if not finished:
        return TrainResult(False, config.out, report)
    _write(config, base, trainer, report)
    discard_checkpoint(checkpoint)
    return TrainResult(True, config.out, report)


def report_folder(out: Path) -> Path:
    """Beside the adapter, not in it: a folder in PEFT layout holds nothing that a strict reader would refuse."""
    return out.parent / f"{out.name}.report"


def prepare(
    config: TrainConfig, base: Base, train_set: Dataset, held_out: Dataset | None, listen: Listener
) -> tuple[Trainer, dict[str, Any]]:
    """The trainer on fresh low-rank matrices, and the lengths of the data (told to the listener as well)."""
    encoder = Encoder(
        base.tokenizer, render=config.render, instruction=config.instruction, max_length=config.max_length
    )
    encoded = encoder.encode(train_set, context_length=base.context_length)
    encoded_eval = encoder.encode(held_out, context_length=base.context_length) if held_out else []
    lengths = _tell_lengths(encoded, encoded_eval, listen)
    torch.manual_seed(config.schedule.seed)
    return Trainer(add_lora(base, config.lora), base, encoded, encoded_eval, config.schedule), lengths


def add_lora(base: Base, shape: LoraShape) -> Any:
    """The base wrapped by PEFT with new matrices: A random, B zero, so that it starts as the base.

    Raises InvalidRequest when a target names no linear of the model.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=shape.rank,
        lora_alpha=shape.rank * 2 if shape.alpha is None else shape.alpha,
        lora_dropout=shape.dropout,
        use_rslora=shape.rslora,
        target_modules=list(shape.targets) or "all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.model.modules()),
    )
    try:
        with warnings.catch_warnings():
            _quiet_peft()
            return get_peft_model(base.model, config)
    except ValueError as error:
        raise InvalidRequest(f"--targets {','.join(shape.targets)}: {error}") from error


def _check(config: TrainConfig, *, overwrite: bool) -> tuple[Dataset, Dataset | None]:
    refuse_existing(config.out, overwrite=overwrite)
    schedule, lora = config.schedule, config.lora
    positive = {
        "--rank": lora.rank, "--epochs": schedule.epochs, "--batch-size": schedule.batch_size,
        "--accumulate": schedule.accumulate, "--lr": schedule.lr, "--max-length": config.max_length,
        "--checkpoint-every": schedule.checkpoint_every,
    }  # fmt: skip
    for flag, value in positive.items():
        if value <= 0:
            raise InvalidRequest(f"{flag} must be positive, not {value}.")
    if schedule.lr > 1:
        raise InvalidRequest(f"--lr must be at most 1, not {schedule.lr:g}: training would only diverge.")
    if not 0 <= lora.dropout < 1:
        raise InvalidRequest(f"--dropout must be at least 0 and below 1, not {lora.dropout}.")
    if schedule.early_stop and config.eval_data is None:
        raise InvalidRequest("--early-stop watches the evaluation loss: give --eval too.")
    train_set = read_dataset(config.data, min_labels=2)
    held_out = read_dataset(config.eval_data) if config.eval_data else None
    if held_out and held_out.shape != train_set.shape:
        raise InvalidRequest(f"--eval has {held_out.shape} rows, --data has {train_set.shape} rows.")
    unseen = set(held_out.labels) - set(train_set.labels) if held_out else set()
    if unseen:
        raise InvalidRequest(f"--eval has labels that --data lacks: {', '.join(sorted(unseen))}.")
    return train_set, held_out


def _check_checkpoint(checkpoint: Path, *, resume: bool, overwrite: bool) -> None:
    if overwrite and not resume:
        discard_checkpoint(checkpoint)
    if checkpoint.exists() and not resume:
        raise InvalidRequest("An interrupted training of this --out exists. Give --resume, or --overwrite to drop it.")
    if resume and not checkpoint.exists():
        raise InvalidRequest("There is nothing to resume for this --out. Run without --resume.")


def _tell_lengths(train: list[Encoded], held_out: list[Encoded], listen: Listener) -> dict[str, Any]:
    found = length_statistics(train)
    message = (
        f"{found.num_examples} examples, {found.num_tokens} tokens; lengths: median {found.median}, "
        f"95% {found.p95}, longest {found.longest} (row {found.longest_row}); answers: median {found.answer_median}"
    )
    listen(Progress("data", message=message))
    if found.num_truncated:
        listen(Progress("warning", message=f"{found.num_truncated} prompts are cut on the left to fit --max-length."))
    return {"train": asdict(found), "eval": asdict(length_statistics(held_out)) if held_out else None}


def _fingerprint(config: TrainConfig) -> str:
    """What a checkpoint belongs to: the settings and the bytes of the data."""
    digest = hashlib.sha256(json.dumps(_settings(config), sort_keys=True).encode())
    for path in (config.data, config.eval_data):
        if path is not None:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _settings(config: TrainConfig) -> dict[str, Any]:
    """The settings without what differs from machine to machine: folders and the command's spelling."""
    values = asdict(replace(config, command="", threads=None))
    for key in ("data", "eval_data", "out", "base"):
        values[key] = Path(values[key]).name if values[key] is not None else None
    return values


def _report(
    config: TrainConfig, base: Base, trainer: Trainer, lengths: dict[str, Any], train_set: Dataset, held: Dataset | None
) -> dict[str, Any]:
    history = trainer.history
    return {
        "settings": _settings(config),
        "base": base.name,
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "device": base.device.type,
        "lengths": lengths,
        "labels": list(train_set.labels),
        "num_eval_examples": len(held) if held else 0,
        "num_parameters": sum(p.numel() for p in trainer.parameters.values()),
        "steps": history.step,
        "tokens": history.num_tokens,
        "seconds": round(history.seconds, 1),
        "best_step": history.best_step,
        "best_eval_loss": history.best_loss if history.eval_loss else None,
        "train_loss": history.train_loss,
        "eval_loss": history.eval_loss,
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _quiet_peft() -> None:
    """PEFT asks transformers an old question on every wrap; the answer is a FutureWarning that no user can act on."""
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)


def _write(config: TrainConfig, base: Base, trainer: Trainer, report: dict[str, Any]) -> None:
    from peft import get_peft_model_state_dict

    model: Any = trainer.model
    tensors = {k: v.detach().to("cpu", torch.bfloat16) for k, v in get_peft_model_state_dict(model).items()}
    with atomic_folder(config.out) as draft:
        report["size_bytes"] = write_adapter(draft, plain_config(model.peft_config["default"], base.name), tensors)
        write_card(draft, Card.of_training(config.title or config.out.name, config.command, report))
    with atomic_folder(report_folder(config.out)) as draft:
        write_json(draft / REPORT, report)
        loss_curve(draft / CURVE, report["train_loss"], report["eval_loss"], report["best_step"])
