"""The body that asks for a fine-tuning job: OpenAI's, and what this server has beyond it under `manylora`."""

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from manylora.api.bodies import Body
from manylora.api.fields import renamed
from manylora.api.schemas import Metadata
from manylora.api.strict import Strict
from manylora.errors import InvalidRequest
from manylora.jobs.order import Activate, Order
from manylora.lifecycle.parameters import Init, Render
from manylora.lifecycle.parameters import Method as LearningMethod
from manylora.lifecycle.train.config import JOB_LR, LoraShape, Schedule, check_method, check_settings
from manylora.settings import Settings

__all__ = ["JobBody", "check_goes_on", "order_of"]

MAX_EPOCHS: Final = 50
MAX_BATCH_SIZE: Final = 256
MAX_ACCUMULATE: Final = 256
MAX_TARGETS: Final = 256
MAX_TARGET_LENGTH: Final = 256
MAX_INSTRUCTION: Final = 16_384
MAX_SUFFIX: Final = 64
MAX_SAMPLES: Final = 8
_SHAPE: Final = ("rank", "alpha", "targets", "dropout", "rslora", "dora", "init", "trained_tokens")


Metric: TypeAlias = Literal[
    "exact_match", "accuracy", "macro_precision", "macro_recall", "macro_f1", "mentioned", "valid_json", "perplexity"
]


def _without_auto(value: Any) -> Any:
    return None if value == "auto" else value


_AUTO: Final = BeforeValidator(_without_auto)
_Words = Annotated[
    list[Annotated[str, Field(max_length=MAX_TARGET_LENGTH)]], Field(max_length=MAX_TARGETS, fail_fast=True)
]


class Hyperparameters(Strict):
    """Each may be `auto`, which is the default of `manylora train`."""

    n_epochs: Annotated[Annotated[int, Field(ge=1, le=MAX_EPOCHS)] | None, _AUTO] = None
    batch_size: Annotated[Annotated[int, Field(ge=1, le=MAX_BATCH_SIZE)] | None, _AUTO] = None
    learning_rate_multiplier: Annotated[Annotated[float, Field(gt=0, allow_inf_nan=False)] | None, _AUTO] = None


class Supervised(Strict):
    """How `method.type` `supervised` learns."""

    hyperparameters: Hyperparameters | None = None


class PreferenceHyperparameters(Hyperparameters):
    """`beta`: how dearly it pays to leave the base's answers."""

    beta: Annotated[Annotated[float, Field(gt=0, allow_inf_nan=False)] | None, _AUTO] = None


class Preference(Strict):
    """How `method.type` `dpo` learns."""

    hyperparameters: PreferenceHyperparameters | None = None


class Method(Strict):
    """How a job learns: from answers as they stand in the rows, or from which of two is preferred."""

    type: Literal["supervised", "dpo"]
    supervised: Supervised | None = None
    dpo: Preference | None = None


class Extension(Strict):
    """What `manylora train` can do beyond OpenAI's API, by its parameters' names; all of it optional.

    `name` is the adapter whose next version comes out. `activate`: whether its name means that version from then on;
    `if_better`: if it is better than what the name means by then, by `metric` on the validation file.
    """

    name: str | None = None
    activate: Activate = "never"
    metric: Metric | None = None
    min_gain: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    rank: int | None = None
    alpha: float | None = None
    targets: _Words | None = None
    dropout: float | None = None
    rslora: bool | None = None
    dora: bool | None = None
    init: Init | None = None
    trained_tokens: _Words | None = None
    instruction: Annotated[str, Field(max_length=MAX_INSTRUCTION)] | None = None
    render: Render | None = None
    max_length: int | None = None
    accumulate: Annotated[int, Field(le=MAX_ACCUMULATE)] | None = None
    lr_ratio: float | None = None
    warmup: float | None = None
    weight_decay: float | None = None
    early_stop: int | None = None
    eval_every: int | None = None
    sample: Annotated[int, Field(ge=0, le=MAX_SAMPLES)] | None = None


class JobBody(Body):
    """`POST /v1/fine_tuning/jobs`."""

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: Annotated[str, Field(max_length=MAX_SUFFIX)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    metadata: Metadata | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    integrations: Annotated[list[Any], Field(max_length=0)] | None = None
    manylora: Extension = Field(default_factory=Extension)

    @model_validator(mode="after")
    def _says_hyperparameters_once(self) -> "JobBody":
        if self.hyperparameters is not None and self.method is not None:
            raise ValueError("'hyperparameters' is what 'method' was before: send one of them.")
        if self.suffix is not None and self.manylora.name is not None:
            raise ValueError("'suffix' and 'manylora.name' both name the adapter: send one of them.")
        judges = self.manylora.metric is not None or self.manylora.min_gain is not None
        if judges and self.manylora.activate != "if_better":
            raise ValueError("'manylora.metric' and 'manylora.min_gain' go with 'manylora.activate' if_better.")
        return self

    @property
    def chosen(self) -> Hyperparameters:
        """From wherever they were sent."""
        chosen = None if self.method is None else self.method.supervised or self.method.dpo
        new = None if chosen is None else chosen.hyperparameters
        return new or self.hyperparameters or Hyperparameters()

    @property
    def learns_by(self) -> LearningMethod:
        return "supervised" if self.method is None else self.method.type


def order_of(body: JobBody, settings: Settings, context_length: int) -> Order:
    """What is to be trained, with every default in its place. Raises InvalidRequest naming the field at fault."""
    _check_method_is_one(body)
    chosen, more = body.chosen, body.manylora
    plain = Schedule(seed=secrets.randbelow(2**31) if body.seed is None else body.seed)
    method, beta = body.learns_by, getattr(chosen, "beta", None) or Order().beta
    lr = JOB_LR[method] * (chosen.learning_rate_multiplier or 1.0)
    schedule = _with(
        replace(plain, lr=lr, epochs=chosen.n_epochs or plain.epochs, batch_size=chosen.batch_size or plain.batch_size),
        more,
        ("accumulate", "lr_ratio", "warmup", "weight_decay", "early_stop", "eval_every"),
    )
    lora: LoraShape = _with(LoraShape(), more, _SHAPE)
    order: Order = _with(
        Order(
            lora,
            schedule,
            tool_prompt=settings.tool_prompt,
            max_length=min(Order().max_length, context_length),
            method=method,
            beta=beta,
        ),
        more,
        ("render", "instruction", "max_length", "sample"),
    )
    try:
        check_settings(order.lora, order.schedule, order.max_length, None)
        check_method(order.method, order.beta, order.lora)
    except InvalidRequest as error:
        where = "hyperparameters" if body.hyperparameters is not None else f"method.{method}.hyperparameters"
        raise _named(error, where) from None
    for name, value, most in (
        ("rank", order.lora.rank, settings.max_rank),
        ("max_length", order.max_length, context_length),
    ):
        if value > most:
            raise InvalidRequest(f"'manylora.{name}' is {value}, and at most {most} here.", param=f"manylora.{name}")
    for name, used in (("early_stop", "watches the loss on"), ("eval_every", "says how often the loss is taken on")):
        if getattr(order.schedule, name) and body.validation_file is None:
            message = f"'manylora.{name}' {used} 'validation_file': send one."
            raise InvalidRequest(message, param=f"manylora.{name}")
    if order.sample and body.validation_file is None:
        message = "'manylora.sample' answers rows of 'validation_file': send one."
        raise InvalidRequest(message, param="manylora.sample")
    return order


def _check_method_is_one(body: JobBody) -> None:
    other = "dpo" if body.learns_by == "supervised" else "supervised"
    if body.method is not None and getattr(body.method, other) is not None:
        message = f"'method.{other}' does not go with 'method.type' {body.learns_by}."
        raise InvalidRequest(message, param=f"method.{other}")


def check_goes_on(body: JobBody) -> None:
    """Of a job that goes on from an adapter. Raises InvalidRequest for what its matrices say already."""
    if body.learns_by == "dpo":
        raise InvalidRequest("'method' dpo compares with the base: 'model' names the base then.", param="method.type")
    said = next((name for name in _SHAPE if name != "dropout" and getattr(body.manylora, name) is not None), None)
    if said is not None:
        message = f"'manylora.{said}' is what the adapter in 'model' has, which the job goes on from. Leave it out."
        raise InvalidRequest(message, param=f"manylora.{said}")


def _with(value: Any, more: Extension, names: tuple[str, ...]) -> Any:
    given: Mapping[str, Any] = {name: getattr(more, name) for name in names if getattr(more, name) is not None}
    return replace(value, **{name: tuple(each) if isinstance(each, list) else each for name, each in given.items()})


def _named(error: InvalidRequest, where: str) -> InvalidRequest:
    """The lifecycle's refusal with its parameters called as the request calls them."""
    own = {"epochs": "n_epochs", "batch_size": "batch_size", "lr": "learning_rate_multiplier", "beta": "beta"}
    name = error.param or ""
    field = f"{where}.{own[name]}" if name in own else f"manylora.{name}"
    error.message = error.message.replace(f"`{name}`", f"'{field}'")
    return renamed(error, {name: field})
