"""What training is told, and its checks: everything that can be refused before a model is looked for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Final

from manylora.lifecycle.data.data import Dataset, Example, Reading, Shape, read_dataset
from manylora.lifecycle.data.look import label_counts, remarks
from manylora.lifecycle.data.report import of_examples
from manylora.lifecycle.data.rows import WRITTEN
from manylora.lifecycle.output import refuse_existing
from manylora.lifecycle.parameters import DeviceName, DtypeName, Init, InvalidParameter, Method, Render, TrainTask
from manylora.lifecycle.progress import Listener, Progress
from manylora.lifecycle.trackers import check_trackers

TASK_ROWS: Final[Mapping[TrainTask, tuple[Shape, str]]] = {
    "classify": ("label", "text and label"),
    "token": ("tags", "tokens and tags"),
    "question": ("question", "question, context and answer"),
    "embed": ("pair", "anchor and positive"),
    "asr": ("sound", "audio and text"),
    "image": ("image", "image and label"),
}
"""The shape of the rows that each task but writing learns from, and their fields."""
HEADED: Final[tuple[TrainTask, ...]] = ("classify", "token", "question", "image")
"""Tasks of which an adapter has a head."""


@dataclass(frozen=True, slots=True)
class LoraShape:
    """Which low-rank matrices there are. `alpha=None` means 2 × rank; no targets means every linear but the head."""

    rank: Annotated[int, "Rank of the low-rank matrices; 0: none, of tasks with a head, which alone is learnt"] = 8
    alpha: Annotated[float | None, "Scale numerator; twice the rank when left out"] = None
    targets: Annotated[tuple[str, ...], "Linears by name, comma-separated; all but the head when left out"] = ()
    dropout: Annotated[float, "Dropout before A"] = 0.0
    rslora: Annotated[bool, "Scale by alpha/sqrt(rank) instead of alpha/rank"] = False
    dora: Annotated[bool, "DoRA: the length of each output's weights is learned apart from their direction"] = False
    init: Annotated[Init, "What the matrices begin as: zero (no effect), or pissa (the base's largest parts)"] = "zero"
    trained_tokens: Annotated[
        tuple[str, ...], "Tokens whose embeddings are trained too, as the vocabulary has them, comma-separated"
    ] = ()


@dataclass(frozen=True, slots=True)
class Schedule:
    """How to optimise. `accumulate` batches make one step; `early_stop` evaluations without gain end it (0: never)."""

    epochs: Annotated[int, "Times that each row is seen"] = 3
    batch_size: Annotated[int, "Rows in one forward pass"] = 8
    accumulate: Annotated[int, "Batches per optimizer step"] = 1
    lr: Annotated[float, "Highest learning rate, after the warm-up; then a cosine to zero"] = 5e-4
    lr_ratio: Annotated[float, "LoRA+: B's learning rate as a multiple of A's"] = 1.0
    warmup: Annotated[float, "Share of the steps with rising learning rate"] = 0.06
    weight_decay: Annotated[float, "AdamW's weight decay"] = 0.01
    max_grad_norm: Annotated[float, "Longest gradient; a longer one is clipped"] = 1.0
    early_stop: Annotated[int, "Stop after so many evaluations without gain; 0: never"] = 0
    eval_every: Annotated[int, "Steps between evaluations; 0: once an epoch"] = 0
    checkpoint_every: Annotated[int, "Steps between checkpoints"] = 50
    seed: Annotated[int, "Decides the order of the rows, the first weights and the dropout"] = 0


JOB_LR: Final[Mapping[Method, float]] = {"supervised": Schedule().lr, "dpo": Schedule().lr * 0.1}
"""What a fine-tuning job's `learning_rate_multiplier` multiplies: preferences move a model more than answers."""


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Everything that decides the result; its JSON is kept in the report."""

    data: Annotated[Path, "Training rows: .jsonl, .json, .csv, .tsv or .parquet, or a folder of those or of images"]
    out: Annotated[Path, "Folder for the adapter"]
    eval_data: Annotated[Path | None, "Held-out rows, to keep the best step"] = None
    base: Annotated[str | None, "The base; the default model when left out"] = None
    base_name: Annotated[str | None, "The base's name in the adapter's config"] = None
    start: Annotated[Path | None, "Folder of an adapter whose weights and shape the training goes on from"] = None
    reading: Reading = field(default_factory=Reading)
    method: Annotated[Method, "supervised, or dpo: of two answers in each row the preferred one is made likelier"] = (
        "supervised"
    )
    beta: Annotated[float, "DPO: how dearly it pays to leave the base's answers"] = 0.1
    lora: LoraShape = field(default_factory=LoraShape)
    schedule: Schedule = field(default_factory=Schedule)
    render: Annotated[Render, "How a row becomes text: chat (the base's template), plain, or auto"] = "auto"
    instruction: Annotated[str, "Text before every prompt, on a line of its own"] = ""
    tool_prompt: Annotated[bool, "Tell a base whose template knows no tools of them in words, as a server does"] = False
    max_length: Annotated[int, "Tokens of an example; longer prompts are cut on the left"] = 1024
    sample: Annotated[int, "Held-out rows that are answered at each evaluation, for you to read"] = 0
    device: Annotated[DeviceName, "auto, cpu or cuda"] = "auto"
    dtype: Annotated[DtypeName, "The base's: auto, bfloat16, float16 or float32"] = "auto"
    threads: Annotated[int | None, "CPU threads"] = None
    title: Annotated[str, "Title of the card"] = ""
    command: str = ""
    task: Annotated[
        TrainTask,
        "generate: answers; classify: a label of each text; token: of each word; question: the words of a text that "
        "answer; embed: vectors; asr: speech; image: a label of each image",
    ] = "generate"
    test_data: Annotated[Path | None, "Rows that the adapter is scored on once, when it is done; not of generate"] = (
        None
    )
    report_to: Annotated[
        tuple[str, ...], "Write the curves for tensorboard, wandb or mlflow too, comma-separated, into `out`.runs"
    ] = ()


@dataclass(frozen=True, slots=True)
class ChooseConfig:
    """`training` holds the data and everything but the rank; its `out` is where the final adapter goes.

    `targets` are the sets of linears to compare; empty: the training's own.
    """

    training: TrainConfig
    ranks: Annotated[tuple[int, ...], "Ranks to compare, comma-separated"] = (1, 2, 4, 8, 16, 32)
    folds: Annotated[int, "Parts of the data; each is held out once"] = 5
    targets: Annotated[tuple[tuple[str, ...], ...], "A set of linears, comma-separated"] = ()
    train_final: Annotated[bool, "Train the chosen shape on all rows"] = False

    @property
    def shapes(self) -> list[LoraShape]:
        sets = self.targets or (self.training.lora.targets,)
        return [replace(self.training.lora, rank=rank, targets=names) for names in sets for rank in sorted(self.ranks)]


def check_settings(
    lora: LoraShape, schedule: Schedule, max_length: int, threads: int | None, *, has_head: bool = False
) -> None:
    """Raises InvalidParameter for the first number that is out of range, by its name.

    A rank of 0 is in range where there is a head to learn (`has_head`).
    """
    positive = {
        "rank": lora.rank or int(has_head), "epochs": schedule.epochs, "batch_size": schedule.batch_size,
        "accumulate": schedule.accumulate, "lr": schedule.lr, "max_length": max_length,
        "checkpoint_every": schedule.checkpoint_every, "max_grad_norm": schedule.max_grad_norm,
        "alpha": 1.0 if lora.alpha is None else lora.alpha, "threads": 1 if threads is None else threads,
        "lr_ratio": schedule.lr_ratio,
    }  # fmt: skip
    for name, value in positive.items():
        if not (math.isfinite(value) and value > 0):
            raise InvalidParameter(f"`{name}` must be positive, not {value}.")
    at_least_zero = {
        "weight_decay": schedule.weight_decay, "early_stop": schedule.early_stop,
        "eval_every": schedule.eval_every, "seed": schedule.seed,
    }  # fmt: skip
    for name, value in at_least_zero.items():
        if not (math.isfinite(value) and value >= 0):
            raise InvalidParameter(f"`{name}` must not be negative, and it is {value}.")
    if schedule.lr > 1:
        raise InvalidParameter(f"`lr` must be at most 1, not {schedule.lr:g}: training would only diverge.")
    if schedule.seed >= 2**32:
        raise InvalidParameter(f"`seed` must be below 2**32, not {schedule.seed}.")
    if not 0 <= schedule.warmup <= 1:
        raise InvalidParameter(f"`warmup` is a share of the steps, from 0 to 1, not {schedule.warmup}.")
    if not 0 <= lora.dropout < 1:
        raise InvalidParameter(f"`dropout` must be at least 0 and below 1, not {lora.dropout}.")


def check_method(method: Method, beta: float, lora: LoraShape) -> None:
    """Raises InvalidParameter."""
    if not (math.isfinite(beta) and beta > 0):
        raise InvalidParameter(f"`beta` must be positive, not {beta}.")
    if method == "dpo" and lora.init != "zero":
        raise InvalidParameter("`init` pissa takes parts out of the base, which `method` dpo compares with. Use zero.")


def check_rows(name: str, task: TrainTask, shape: Shape) -> None:
    """Raises InvalidParameter for rows that the task does not learn from; `name` is the parameter that has them."""
    if task in TASK_ROWS:
        wanted, fields = TASK_ROWS[task]
        if shape != wanted:
            raise InvalidParameter(f"`task` {task} takes rows of {fields}, and `{name}` has {shape} rows.")
    elif shape not in WRITTEN:
        other = next(task for task, (wanted, _) in TASK_ROWS.items() if wanted == shape)
        raise InvalidParameter(f"`{name}` has {shape} rows, from which nothing is written. Give `task` {other}.")


def check_shape(method: Method, shape: Shape) -> None:
    """Raises InvalidParameter for rows that the method does not learn from."""
    if (shape == "preference") != (method == "dpo"):
        needed = "rows with two answers, preferred_output and non_preferred_output" if method == "dpo" else "one answer"
        raise InvalidParameter(f"`data` has {shape} rows, and `method` {method} learns from {needed}.")


def check(config: TrainConfig, *, overwrite: bool, listen: Listener) -> tuple[Dataset, Dataset | None]:
    """The rows to learn from and those held out. Raises InvalidRequest for bad data or settings."""
    refuse_existing(config.out, overwrite=overwrite)
    has_head = config.task in HEADED
    check_settings(config.lora, config.schedule, config.max_length, config.threads, has_head=has_head)
    check_method(config.method, config.beta, config.lora)
    check_trackers(config.report_to)
    if config.schedule.early_stop and config.eval_data is None:
        raise InvalidParameter("`early_stop` watches the evaluation loss: give `eval_data` too.")
    if config.sample < 0 or (config.sample and config.eval_data is None):
        raise InvalidParameter("`sample` is a number of rows of `eval_data`: give that too, and at least 0.")
    check_task(config)
    return checked_data(config, listen)


def check_task(config: TrainConfig) -> None:
    """Raises InvalidParameter for what the task has no place for: no task but writing has prompts."""
    _check_head_alone(config)
    if config.task == "generate":
        if config.test_data is not None:
            raise InvalidParameter(
                "`test_data` is scored by the tasks that do not write. `manylora evaluate` scores those."
            )
        return
    plain = TrainConfig(config.data, config.out)
    for name in ("render", "instruction", "tool_prompt", "sample", "method", "start"):
        if getattr(config, name) != getattr(plain, name):
            raise InvalidParameter(f"`{name}` has no place in `task` {config.task}, which reads the bare text.")
    if config.task == "image" and (config.lora.trained_tokens or config.max_length != plain.max_length):
        name = "trained_tokens" if config.lora.trained_tokens else "max_length"
        raise InvalidParameter(f"`{name}` has no place in `task` image: images have no tokens.")


def _check_head_alone(config: TrainConfig) -> None:
    """Raises InvalidParameter for what is said of matrices where `rank` 0 leaves none."""
    if config.lora.rank:
        return
    for name, value in asdict(LoraShape()).items():
        if name != "rank" and value != getattr(config.lora, name):
            raise InvalidParameter(f"`{name}` has no place beside `rank` 0, which learns the head alone.")


def checked_data(config: TrainConfig, listen: Listener) -> tuple[Dataset, Dataset | None]:
    """The rows to learn from and those held out, with what is odd about them told. Raises InvalidRequest."""
    train_set = read_dataset(config.data, min_labels=2, reading=config.reading)
    held_out = read_dataset(config.eval_data, reading=config.reading) if config.eval_data else None
    check_rows("data", config.task, train_set.shape)
    check_shape(config.method, train_set.shape)
    counts = label_counts(train_set)
    if counts:
        listen(Progress("labels", message=f"`data`: {counts}"))
    for remark in remarks(train_set):
        listen(Progress("warning", message=f"`data`: {remark}"))
    _tell_report("data", train_set, (), listen)
    if config.test_data is not None:
        _check_held_out("test_data", read_dataset(config.test_data, reading=config.reading), train_set, listen)
    if held_out is None:
        return train_set, None
    _check_held_out("eval_data", held_out, train_set, listen)
    return train_set, held_out


def _check_held_out(name: str, held_out: Dataset, train_set: Dataset, listen: Listener) -> None:
    """Raises InvalidParameter for rows of another shape, or with labels that are not learnt."""
    _tell_report(name, held_out, train_set.examples, listen)
    if held_out.shape != train_set.shape:
        raise InvalidParameter(f"`{name}` has {held_out.shape} rows, `data` has {train_set.shape} rows.")
    unseen = set(held_out.labels) - set(train_set.labels)
    if unseen:
        raise InvalidParameter(f"`{name}` has labels that `data` lacks: {', '.join(sorted(unseen))}.")
    known = {example.messages for example in train_set.examples}
    shared = [example.row for example in held_out.examples if example.messages in known]
    if shared:
        message = (
            f"{len(shared)} of {len(held_out)} rows of `{name}` are in `data` too (the first is row {shared[0]}): "
            "they say nothing about new data."
        )
        listen(Progress("warning", message=message))


def _tell_report(name: str, dataset: Dataset, learnt: Sequence[Example], listen: Listener) -> None:
    """What is to be known of the rows, for a program; and for a person what looks personal in them."""
    report = of_examples(name, dataset.shape, dataset.examples, learnt)
    listen(Progress("report", report={"file": name, **report.numbers()}))
    told = ", ".join(f"{kind} {found.count}, first in row {found.rows[0]}" for kind, found in report.personal.items())
    if told:
        listen(Progress("warning", message=f"`{name}`: Rows that may have a person's data: {told}."))


def check_checkpoint(checkpoint: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises InvalidRequest when there is a checkpoint and no word about it, or none to resume."""
    if overwrite and not resume:
        checkpoint.unlink(missing_ok=True)
    if checkpoint.exists() and not resume:
        raise InvalidParameter(
            "An interrupted training of this `out` exists. Give `resume`, or `overwrite` to drop it."
        )
    if resume and not checkpoint.exists():
        raise InvalidParameter("There is nothing to resume for this `out`. Run without `resume`.")
