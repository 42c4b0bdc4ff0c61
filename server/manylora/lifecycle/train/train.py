"""`manylora train`: data in, an adapter in PEFT layout out, with its loss curve, report and card."""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch

from manylora.identity import TENSOR_FILE
from manylora.lifecycle.adapter_files import plain_config, write_adapter
from manylora.lifecycle.base import Base, load_base, load_tokenizer, memory_faults, quiet_peft
from manylora.lifecycle.card import Card, write_card
from manylora.lifecycle.data.batches import check_known, epoch_order, padding_share
from manylora.lifecycle.data.data import Dataset, read_dataset
from manylora.lifecycle.data.encoding import Encoded, Encoder, length_statistics, tell_lengths
from manylora.lifecycle.data.look import Seen, seen
from manylora.lifecycle.evaluate.contenders import generate
from manylora.lifecycle.extras import decoration, need
from manylora.lifecycle.output import (
    atomic_file,
    checkpoint_path,
    report_folder,
    result_and_report,
    runs_folder,
    write_json,
)
from manylora.lifecycle.parameters import InvalidParameter
from manylora.lifecycle.plots import loss_curve
from manylora.lifecycle.progress import Listener, Progress, ignore
from manylora.lifecycle.tasks.interface import Source, TaskBase
from manylora.lifecycle.tasks.registry import TASKS
from manylora.lifecycle.trackers import tracked
from manylora.lifecycle.train.checkpoint import discard_checkpoint, load_checkpoint, save_checkpoint
from manylora.lifecycle.train.config import LoraShape, Schedule, TrainConfig, check, check_checkpoint, checked_data
from manylora.lifecycle.train.memory import check_memory
from manylora.lifecycle.train.objectives import Answers, Objective, Preferences
from manylora.lifecycle.train.start import going_on, started
from manylora.lifecycle.train.training import Diverged, Trainer

__all__ = ["LoraShape", "TrainConfig", "TrainResult", "add_lora", "encode", "prepare", "report_folder", "train"]

REPORT = "train.json"
CURVE = "loss.png"
_LATER: Final = {"lora": ("dora", "init", "trained_tokens"), "schedule": ("lr_ratio",)}
_LATER_WHOLE: Final = ("reading", "tool_prompt", "method", "beta", "start", "task", "test_data")
# What is small beside the base's own numbers, so that rounding it to 16 bits does not show in them.
_SMALL: Final = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
MEMORY_ADVICE = "Lower `batch_size` (and raise `accumulate` as much, for the same result), or `max_length`."


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
    need("peft", "matplotlib")
    config = going_on(config)
    train_set, held_out = check(config, overwrite=overwrite, listen=listen)
    checkpoint = checkpoint_path(config.out)
    check_checkpoint(checkpoint, resume=resume, overwrite=overwrite)
    data = encode(config, train_set, held_out, listen)
    if config.threads:
        torch.set_num_threads(config.threads)
    base = load_for(config, train_set)
    check_known([*data.train, *data.held_out, *data.test], base.num_embeddings)
    trainer = prepare(config, base, data)
    num_parameters = sum(p.numel() for p in trainer.parameters.values())
    check_memory(base, data.train, config.schedule, num_parameters, MEMORY_ADVICE, listen)
    fingerprint = _fingerprint(config, train_set, held_out)
    if resume:
        load_checkpoint(checkpoint, trainer, fingerprint)
    listen(trainer.progress("plan", values={"tokens": trainer.planned_tokens}))
    samples = Samples(config.sample, base, trainer, data, listen)

    def keep() -> None:
        save_checkpoint(checkpoint, trainer, fingerprint)
        listen(Progress("checkpoint"))

    try:
        with memory_faults(MEMORY_ADVICE), _tracked(config, listen, lambda: finished) as told:
            finished = trainer.run(told, should_stop, keep, samples.take)
    except Diverged:
        discard_checkpoint(checkpoint)  # going on from there would only diverge again
        raise
    unit = {"unit": unit_of(config)} if config.task in TASKS else {}
    report = _report(config, base, trainer, data, train_set) | unit | {"samples": samples.taken}
    if not finished:
        return TrainResult(False, config.out, report)
    report |= _scores(config, base, trainer, data, listen)
    _write(config, base, trainer, report)
    discard_checkpoint(checkpoint)
    with decoration("The loss curve", listen), atomic_file(report_folder(config.out) / CURVE) as draft:
        of = {"of": "pair of answers"} if config.method == "dpo" else {}
        of |= {"of": f"{unit_of(config)} (nats)"} if config.task in TASKS else {}
        loss_curve(draft, report["train_loss"], report["eval_loss"], report["best_step"], **of)
    return TrainResult(True, config.out, report)


def _tracked(
    config: TrainConfig, listen: Listener, has_finished: Callable[[], bool]
) -> AbstractContextManager[Listener]:
    """The listener, which also writes files of `report_to`."""
    folder = runs_folder(config.out)
    return tracked(config.report_to, folder, config.out.name, _settings(config), listen, has_finished)


def load_for(config: TrainConfig, train_set: Dataset) -> Base:
    """The base that a training with these rows is on."""
    if config.task in TASKS:
        task = TASKS[config.task]
        return task.load(source_of(config), task.labels(train_set))
    return load_base(
        config.base, name=config.base_name, device=config.device, dtype=config.dtype, max_length=config.max_length
    )


def source_of(config: TrainConfig) -> Source:
    return Source(config.base, config.base_name, config.device, config.dtype, config.schedule.seed)


def _scores(config: TrainConfig, base: Base, trainer: Trainer, data: "TrainData", listen: Listener) -> dict[str, Any]:
    """For the report, how the adapter of a task does on rows that it has not learnt from; empty where there are none.

    Beside it the bare base, where that does the task, too.
    """
    scored = data.test or data.held_out
    if not isinstance(base, TaskBase) or not scored:
        return {}
    task = TASKS[config.task]
    model: Any = trainer.model
    with torch.no_grad():  # what is scored is what is written
        for name, value in trainer.parameters.items():
            if _is_small(name) and config.lora.init != "pissa":
                value.copy_(value.bfloat16())
    measured = task.measured(model, base, scored)
    values = measured.values()
    report = {"scores": {"num_examples": measured.count, **values, **measured.detail}}
    if base.has_answers:
        with model.disable_adapter():
            report["base_scores"] = task.measured(model, base, scored).values()
    before = report.get("base_scores", {})
    told = ", ".join(
        f"{name} {value:.3f}" + (f" (the base: {before[name]:.3f})" if before else "") for name, value in values.items()
    )
    listen(Progress("scores", message=f"`{'test_data' if data.test else 'eval_data'}`: {told}"))
    return report


@dataclass(slots=True)
class Samples:
    """What the first held-out rows are answered at each evaluation, greedy; told, and kept for the report."""

    count: int
    base: Base
    trainer: Trainer
    data: "TrainData"
    listen: Listener
    taken: list[dict[str, Any]] = field(default_factory=list)

    def take(self) -> None:
        examples = self.data.held_out[: self.count]
        if not examples:
            return
        self.trainer.model.eval()
        assert self.data.encoder is not None, "samples are of what writes"
        longest = max(one.num_answer_tokens for one in examples) + 1
        answers = generate(self.trainer.model, self.base, self.data.encoder, examples, longest, lambda _: None)
        step = self.trainer.history.step
        for one, answer in zip(examples, answers, strict=True):
            row, wanted = one.example.row, one.example.answer
            sample = {"step": step, "row": row, "wanted": wanted, "answered": answer}
            self.taken.append(sample)
            message = f"step {step}, row {row}: {answer!r}, wanted {wanted!r}"
            self.listen(Progress("sample", message=message, sample=sample))


def preview(config: TrainConfig, count: int, listen: Listener = ignore) -> list[Seen]:
    """The first rows as training gets them, with what is odd about all of them told; nothing is trained or written.

    Raises InvalidRequest for bad data.
    """
    train_set, _ = checked_data(config, listen)
    tokenizer, context_length = load_tokenizer(config.base)
    encoded = encoder_of(config, tokenizer).encode(train_set, context_length=context_length)
    tell_lengths("`data`", encoded, listen)
    return list(seen(encoded[:count], tokenizer))


@dataclass(frozen=True, slots=True)
class TrainData:
    """The examples as tokens, and what is to be said of their lengths. `padding` is its share of all positions.

    `encoder` made them; None for tasks whose texts are no prompts. `sha256` is that of either file, `data` and `eval`,
    followed by the files that its rows name.
    """

    train: list[Encoded]
    held_out: list[Encoded]
    lengths: dict[str, Any]
    padding: float
    encoder: Encoder | None
    sha256: dict[str, str | None]
    test: list[Encoded] = field(default_factory=list)


def encode(config: TrainConfig, train_set: Dataset, held_out: Dataset | None, listen: Listener) -> TrainData:
    """Both files as tokens, with their lengths told; needs the base's tokenizer only.

    Raises InvalidRequest naming the rows that the model cannot hold.
    """
    encoder = None
    test_set = None if config.test_data is None else read_dataset(config.test_data, reading=config.reading)
    if config.task not in TASKS:
        encoder = encoder_of(config, load_tokenizer(config.base)[0])
    train, evaluation, test = (
        [] if rows is None else encode_rows(config, rows) for rows in (train_set, held_out, test_set)
    )
    lengths = [len(e) for e in train]
    batches = epoch_order(lengths, config.schedule.batch_size, seed=config.schedule.seed, epoch=0)
    padding = padding_share(lengths, batches)
    tell_lengths("`data`", train, listen, f"; {padding:.1%} padding in batches of like length")
    if evaluation:
        tell_lengths("`eval_data`", evaluation, listen)
    told = {"train": asdict(length_statistics(train)), "eval": None}
    if evaluation:
        told["eval"] = asdict(length_statistics(evaluation))
    sha256 = {"data": _sha256(train_set), "eval": _sha256(held_out)}
    return TrainData(train, evaluation, told, padding, encoder, sha256, test)


def encode_rows(config: TrainConfig, rows: Dataset) -> list[Encoded]:
    """A file as tokens. Raises InvalidRequest naming the rows that the model cannot hold."""
    if config.task in TASKS:
        return TASKS[config.task].encode(rows, source_of(config), config.max_length)
    tokenizer, context_length = load_tokenizer(config.base)
    return encoder_of(config, tokenizer).encode(rows, context_length=context_length)


def unit_of(config: TrainConfig) -> str:
    """What the loss is the mean over."""
    return TASKS[config.task].unit if config.task in TASKS else "answer token"


def encoder_of(config: TrainConfig, tokenizer: Any) -> Encoder:
    """What makes tokens of this training's rows. Raises InvalidParameter."""
    return Encoder(
        tokenizer,
        render=config.render,
        instruction=config.instruction,
        max_length=config.max_length,
        tool_prompt=config.tool_prompt,
    )


def prepare(config: TrainConfig, base: Base, data: TrainData) -> Trainer:
    """The trainer on low-rank matrices, fresh ones, the same for the same seed, or those that it goes on from."""
    torch.manual_seed(config.schedule.seed)
    model = _wrapped(config, base)
    return Trainer(model, base, data.train, data.held_out, config.schedule, objective_of(config, model, base))


def objective_of(config: TrainConfig, model: Any, base: Base) -> Objective:
    """What the training makes small."""
    if isinstance(base, TaskBase):
        return TASKS[config.task].objective(model, base)
    return Preferences(model, base, config.beta) if config.method == "dpo" else Answers(model, base)


def _wrapped(config: TrainConfig, base: Base) -> Any:
    if config.start is None:
        return add_lora(base, config.lora)
    with quiet_peft():
        return started(base.model, config.start, config.lora.dropout)


def add_lora(base: Base, shape: LoraShape) -> Any:
    """The base wrapped by PEFT with new matrices: A random, B zero, so that it starts as the base; of rank 0 with none.

    Raises InvalidRequest when a target names no linear of the model.
    """
    from peft import LoraConfig, get_peft_model
    from peft.utils.constants import DUMMY_TARGET_MODULES
    from transformers.pytorch_utils import Conv1D

    kept: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if isinstance(base, TaskBase):
        kept = {"task_type": base.peft_task, "modules_to_save": list(base.whole) or None}
    if shape.rank == 0:
        with quiet_peft():
            return get_peft_model(base.model, LoraConfig(target_modules=DUMMY_TARGET_MODULES, **kept))
    config = LoraConfig(
        **kept,
        r=shape.rank,
        lora_alpha=shape.rank * 2 if shape.alpha is None else shape.alpha,
        lora_dropout=shape.dropout,
        use_rslora=shape.rslora,
        use_dora=shape.dora,
        init_lora_weights="pissa" if shape.init == "pissa" else True,
        trainable_token_indices=_token_ids(base, shape.trained_tokens) or None,
        target_modules=list(shape.targets) or "all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.model.modules()),
    )
    try:
        with quiet_peft():
            return get_peft_model(base.model, config)
    except ValueError as error:
        raise InvalidParameter(f"`targets` {','.join(shape.targets)}: {error}") from error


def _token_ids(base: Base, names: tuple[str, ...]) -> list[int]:
    """Raises InvalidParameter for a name that is no token of the base."""
    if not names:
        return []
    known = base.tokenizer.get_vocab()
    strange = [name for name in names if known.get(name, base.num_embeddings) >= base.num_embeddings]
    if strange:
        raise InvalidParameter(
            f"`trained_tokens`: {', '.join(map(repr, strange))} is no token of the base. Name tokens that it has, as "
            "its vocabulary spells them, such as <|im_start|>."
        )
    return sorted({known[name] for name in names})


def _fingerprint(config: TrainConfig, train_set: Dataset, held_out: Dataset | None) -> str:
    """What a checkpoint belongs to: the settings and the bytes of the data, files that rows name included."""
    settings = _settings(config)
    for part, default in (("lora", LoraShape()), ("schedule", Schedule())):
        for name in _LATER[part]:  # so that a checkpoint of before there was such a setting can be gone on from
            if getattr(default, name) == getattr(getattr(config, part), name):
                del settings[part][name]
    plain = TrainConfig(config.data, config.out)
    for name in _LATER_WHOLE:
        if getattr(config, name) == getattr(plain, name):
            del settings[name]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for dataset in (train_set, held_out):
        for content in () if dataset is None else dataset.contents():
            digest.update(content)
    if config.start is not None:
        digest.update((config.start / TENSOR_FILE).read_bytes())
    return digest.hexdigest()


def _settings(config: TrainConfig) -> dict[str, Any]:
    """The settings without what differs from machine to machine: folders and the command's spelling."""
    values = asdict(replace(config, command="", threads=None))
    del values["sample"], values["report_to"]  # which change nothing that comes out
    for key in ("data", "eval_data", "test_data", "out", "base", "start"):
        values[key] = Path(values[key]).name if values[key] is not None else None
    return values


def _sha256(dataset: Dataset | None) -> str | None:
    if dataset is None:
        return None
    digest = hashlib.sha256()
    for part in dataset.contents():
        digest.update(part)
    return digest.hexdigest()


def _report(config: TrainConfig, base: Base, trainer: Trainer, data: TrainData, train_set: Dataset) -> dict[str, Any]:
    history = trainer.history
    said = trainer.estimate
    estimate = None if said is None else {"after_step": said[0], "seconds": round(said[1], 1)}
    return {
        "settings": _settings(config),
        "base": base.name,
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "device": base.device.type,
        "lengths": data.lengths,
        "padding": round(data.padding, 4),
        "labels": list(train_set.labels),
        "data_sha256": data.sha256,
        "num_eval_examples": len(data.held_out),
        "num_parameters": sum(p.numel() for p in trainer.parameters.values()),
        "steps": history.step,
        "tokens": history.num_tokens,
        "seconds": round(history.seconds, 1),
        "estimate": estimate,
        "best_step": history.best_step,
        "best_eval_loss": history.best_loss if history.eval_loss else None,
        "train_loss": history.train_loss,
        "eval_loss": history.eval_loss,
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _is_small(name: str) -> bool:
    return any(part in _SMALL for part in name.split("."))


def _write(config: TrainConfig, base: Base, trainer: Trainer, report: dict[str, Any]) -> None:
    from peft import get_peft_model_state_dict

    model: Any = trainer.model
    is_whole = config.lora.init == "pissa"
    tensors = {
        name: value.detach().to("cpu", torch.bfloat16 if not is_whole and _is_small(name) else torch.float32)
        for name, value in get_peft_model_state_dict(model).items()
    }
    with result_and_report(config.out) as (result, beside):
        written = plain_config(model.peft_config["default"], base.name)
        if isinstance(base, TaskBase) and report["labels"]:
            written |= {"id2label": {str(number): name for number, name in enumerate(base.labels)}}
        report["size_bytes"] = write_adapter(result, written, tensors)
        write_card(result, Card.of_training(config.title or config.out.name, config.command, report))
        write_json(beside / REPORT, report)
