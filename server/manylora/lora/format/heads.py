"""An adapter's head: what turns hidden states into the scores of its own labels, beside its low-rank pairs.

A base's plan says which layers the head of a task has. The file has their weights, each layer a module of the adapter
whose base weight is zero, so that layout, packing and device memory know nothing new; layers that the adapter does not
bring may come from the base's checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from manylora.identity import CONFIG_FILE, TENSOR_FILE
from manylora.lora.format.problems import Problems, shown
from manylora.lora.format.spec import AdaptedModule, Dense, Head, Output, ProblemType, Term
from manylora.lora.format.tensors import TensorView

__all__ = ["EACH_TOKEN", "QUESTION_LABELS", "Activation", "HeadPart", "HeadPlan", "HeadStage", "Source", "read_head"]

Activation: TypeAlias = Literal["none", "tanh", "relu", "gelu"]
Source: TypeAlias = Literal["pooler", "first", "last", "mean", "rest", "first_and_rest", "every"]
"""What a head reads: what the pooler makes of the first token's state, that state, the last token's, the mean of all,
the mean of all but the first, the first and that mean behind it, or each alone."""

EACH_TOKEN: Final = frozenset({"TOKEN_CLS", "QUESTION_ANS"})
"""Tasks whose heads have scores for each token of a text."""
QUESTION_LABELS: Final = ("start", "end")
"""What each token's scores of QUESTION_ANS say: that an answer begins there, or ends."""

MAX_LABELS: Final = 4096
MAX_LABEL_LENGTH: Final = 200

_PREFIX: Final = "base_model.model."
_PROBLEMS: Final[Mapping[str, ProblemType]] = {
    "single_label_classification": "single",
    "multi_label_classification": "multi",
    "regression": "regression",
}
# PEFT writes the first two for every classifier, whatever the model calls its head.
_USUAL: Final = frozenset({"classifier", "score", "qa_outputs"})


@dataclass(frozen=True, slots=True)
class HeadStage:
    """One layer of a head, and what follows it.

    `path` is its name in the model with a head. `out_features` is None for the last one, which has one output for each
    label. `weight`, `bias`: what the base's checkpoint has of it, for adapters that do not bring it. `eps` is a norm's.
    """

    path: str
    kind: Literal["linear", "norm"]
    in_features: int
    out_features: int | None
    has_bias: bool
    activation: Activation
    eps: float = 0.0
    weight: TensorView | None = None
    bias: TensorView | None = None

    @property
    def name(self) -> str:
        """The name by which `modules_to_save` has it: the first part of its path."""
        return self.path.partition(".")[0]


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """How the head of a task computes over one base."""

    task: str
    source: Source
    stages: tuple[HeadStage, ...]

    def site(self, stage: HeadStage) -> str:
        """What the layer is called among the modules of an adapter."""
        return f"{self.task}:{stage.path}"

    @property
    def sites(self) -> list[str]:
        """Of all layers, in their order."""
        return [self.site(stage) for stage in self.stages]


@dataclass(frozen=True, slots=True)
class HeadPart:
    """A file without its head: `config` and `tensors` are the method's own, `modules` the head's layers."""

    config: dict[str, Any]
    tensors: Mapping[str, TensorView]
    modules: tuple[AdaptedModule, ...]
    head: Head | None


def read_head(
    config: dict[str, Any], tensors: Mapping[str, TensorView], plan: HeadPlan, problems: Problems, warnings: list[str]
) -> HeadPart:
    """Take the head out of an adapter of the plan's task; every fault goes to `problems`."""
    mine = {f"{_PREFIX}{stage.path}.{part}" for stage in plan.stages for part in ("weight", "bias")}
    rest = {name: view for name, view in tensors.items() if name not in mine}
    reader = _Reader(tensors, plan, problems)
    modules = reader.modules()
    names = config.get("modules_to_save")
    own = _USUAL | {stage.name for stage in plan.stages}
    kept = [name for name in names if name not in own] if isinstance(names, list) else names
    without = {name: value for name, value in config.items() if name not in ("id2label", "label2id", "problem_type")}
    without["modules_to_save"] = kept or None
    if plan.task == "QUESTION_ANS":
        labels = reader.question_labels()
    else:
        labels = _labels(config.get("id2label"), reader.num_labels, problems, warnings)
    head = None if labels is None else Head(plan.task, labels, _problem(config, problems))
    return HeadPart(without, rest, modules, head)


class _Reader:
    """The layers of one file's head."""

    def __init__(self, tensors: Mapping[str, TensorView], plan: HeadPlan, problems: Problems) -> None:
        self._tensors = tensors
        self._plan = plan
        self._problems = problems
        self.num_labels: int | None = None

    def modules(self) -> tuple[AdaptedModule, ...]:
        """Complete only if no problem was added."""
        last = self._plan.stages[-1]
        if self._own(last, "weight") is None:
            self._add(
                "head_missing",
                f"{_PREFIX}{last.path}.weight",
                f"The config's task is {self._plan.task} and the file has no head for it. Save the adapter with PEFT's "
                f"save_pretrained, with {shown(last.name)} in modules_to_save.",
            )
            return ()
        found = []
        for stage in self._plan.stages:
            terms = self._terms(stage)
            if terms:
                kind: Literal["linear", "norm"] = stage.kind
                found.append(AdaptedModule(self._plan.site(stage), kind, terms))
        return tuple(found)

    def question_labels(self) -> tuple[str, ...] | None:
        """Two scores for each token and no others; None, with the reason among the problems."""
        if self.num_labels in (None, len(QUESTION_LABELS)):
            return QUESTION_LABELS
        name = f"{_PREFIX}{self._plan.stages[-1].path}.weight"
        self._add("head_shape", name, f"A head of QUESTION_ANS has two outputs, start and end, not {self.num_labels}.")
        return None

    def _terms(self, stage: HeadStage) -> tuple[Term, ...]:
        weight, bias = self._own(stage, "weight"), self._own(stage, "bias")
        if weight is None:
            weight, bias = stage.weight, stage.bias
            if weight is None:
                self._add(
                    "head_untrained",
                    f"{_PREFIX}{stage.path}.weight",
                    "Neither the file nor the base has this layer of the head: its weights were random in training and "
                    f"are lost, so no answer can be right. Train again with {shown(stage.name)} in modules_to_save.",
                )
                return ()
        rows = weight.shape[0] if stage.out_features is None and len(weight.shape) == 2 else stage.out_features
        wanted = (stage.in_features,) if stage.kind == "norm" else (rows, stage.in_features)
        width = wanted[0]
        if weight.shape != wanted or not weight.numel or (bias is not None and bias.shape != (width,)):
            shapes = [list(each.shape) for each in (weight, bias) if each is not None]
            self._add(
                "head_shape",
                f"{_PREFIX}{stage.path}.weight",
                f"Weight and bias have the shapes {shown(shapes)}; over this base it is "
                f"{shown(['labels' if stage.out_features is None else width, *wanted[1:]])}. Train it on this base.",
            )
            return ()
        if stage.out_features is None:
            self.num_labels = width
        if stage.kind == "norm":
            return (Output(scale=weight, shift=bias),)
        return (Dense(weight), *(() if bias is None else (Output(shift=bias),)))

    def _own(self, stage: HeadStage, part: str) -> TensorView | None:
        return self._tensors.get(f"{_PREFIX}{stage.path}.{part}")

    def _add(self, code: str, name: str, message: str) -> None:
        self._problems.add(code, f"{TENSOR_FILE}: {shown(name)}", message)


def _problem(config: Mapping[str, Any], problems: Problems) -> ProblemType:
    said = config.get("problem_type")
    if said is None:
        return "single"
    if not isinstance(said, str) or said not in _PROBLEMS:
        named = ", ".join(_PROBLEMS)
        problems.add("bad_config", f"{CONFIG_FILE}: problem_type", f"It must be one of {named}, not {shown(said)}.")
        return "single"
    return _PROBLEMS[said]


def _labels(said: object, num_labels: int | None, problems: Problems, warnings: list[str]) -> tuple[str, ...] | None:
    """One name for each output; None, with the reason in `problems`, where they do not fit."""
    if num_labels is None:
        return None
    where = f"{CONFIG_FILE}: id2label"
    if num_labels > MAX_LABELS:
        problems.add("head_labels", TENSOR_FILE, f"The head has {num_labels} labels; at most {MAX_LABELS} are served.")
        return None
    if said is None:
        if num_labels > 1:
            warnings.append(
                f"The config has no id2label, which PEFT does not save, so the {num_labels} labels are called LABEL_0, "
                "LABEL_1 and so on. Add id2label to adapter_config.json."
            )
        return tuple(f"LABEL_{number}" for number in range(num_labels))
    wanted = [str(number) for number in range(num_labels)]
    if not isinstance(said, dict) or sorted(said, key=str) != sorted(wanted):
        problems.add(
            "head_labels", where, f"The head has {num_labels} outputs: id2label must have a name for each of 0 to "
            f"{num_labels - 1}, not {shown(said)}."
        )  # fmt: skip
        return None
    labels = tuple(said[number] for number in wanted)
    if not all(isinstance(label, str) and 0 < len(label) <= MAX_LABEL_LENGTH for label in labels):
        problems.add("head_labels", where, f"A label is a text of 1 to {MAX_LABEL_LENGTH} characters.")
        return None
    if len(set(labels)) != len(labels):
        problems.add("head_labels", where, "Two outputs have the same label.")
        return None
    return labels
