"""What a base offers to adapters beside its modules: heads of tasks, and of some bases another naming.

An adapter may have been trained on the bare encoder or on the encoder inside a model with a head, which puts a name
before every path: `bert.encoder.layer.0…` for `encoder.layer.0…`. Its tensors say which, and what its config names is
looked for under the same names.
"""

from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

from manylora.lora.format.heads import HeadPlan
from manylora.lora.format.spec import AdaptedModule, BaseWeights, ModuleSpec
from manylora.lora.format.tensors import TensorView

__all__ = [
    "EncoderModules",
    "HeadedModules",
    "ImageModules",
    "Naming",
    "SpeechModules",
    "bare_task_of",
    "naming_of",
    "plan_of",
    "tasks_of",
]

_PREFIX: Final = "base_model.model."
_POOLER: Final = "pooler."


class HeadedModules(dict[str, ModuleSpec]):
    """A base's modules by path. `heads`: how the heads of tasks compute over it."""

    def __init__(self, modules: Mapping[str, ModuleSpec], heads: Mapping[str, HeadPlan] | None = None) -> None:
        super().__init__(modules)
        self.heads = heads or {}


class EncoderModules(HeadedModules):
    """An encoder's modules by path. `prefix`: the name that it has inside a model with a head, such as "bert"."""

    def __init__(
        self, modules: Mapping[str, ModuleSpec], prefix: str, heads: Mapping[str, HeadPlan] | None = None
    ) -> None:
        super().__init__(modules, heads)
        self.prefix = prefix


class ImageModules(EncoderModules):
    """The modules of an encoder of images by path."""


class SpeechModules(dict[str, ModuleSpec]):
    """The modules of a model of speech by path, of its encoder and its decoder."""


class Naming:
    """How one adapter calls the base's modules: with `before` in front of each path.

    `has_pooler`: whether the model that it was trained in had one; most with a head of their own have none.
    """

    def __init__(self, before: str, *, has_pooler: bool = True) -> None:
        self._before = before
        self._has_pooler = has_pooler

    def outside(self, modules: Mapping[str, ModuleSpec]) -> Mapping[str, ModuleSpec]:
        """The modules under the adapter's names."""
        if not self._has_pooler:
            modules = {path: spec for path, spec in modules.items() if not path.startswith(_POOLER)}
        if not self._before:
            return modules
        return {f"{self._before}{path}": replace(spec, path=f"{self._before}{path}") for path, spec in modules.items()}

    def weights(self, base: BaseWeights | None) -> BaseWeights | None:
        """The base's numbers under the adapter's names."""
        return base if base is None or not self._before else _Renamed(base, self._before)

    def inside(self, modules: Iterable[AdaptedModule]) -> tuple[AdaptedModule, ...]:
        """The adapted modules under the base's own names."""
        return tuple(replace(module, path=module.path.removeprefix(self._before)) for module in modules)


class _Renamed:
    def __init__(self, base: BaseWeights, before: str) -> None:
        self._base = base
        self._before = before

    def find(self, path: str, part: str) -> TensorView | None:
        return self._base.find(path.removeprefix(self._before), part)


def tasks_of(modules: Mapping[str, ModuleSpec]) -> frozenset[str]:
    """What adapters for a base with these modules may have been trained for, in PEFT's words."""
    heads = modules.heads if isinstance(modules, HeadedModules) else ()
    return frozenset({bare_task_of(modules) or "SEQ_2_SEQ_LM", *heads})


def bare_task_of(modules: Mapping[str, ModuleSpec]) -> str | None:
    """What PEFT calls the task of an adapter without a head on a base with these modules.

    None for speech: the class that PEFT has for its task takes token ids where Whisper takes sound.
    """
    if isinstance(modules, SpeechModules):
        return None
    return "FEATURE_EXTRACTION" if isinstance(modules, EncoderModules) else "CAUSAL_LM"


def plan_of(
    config: Mapping[str, Any], modules: Mapping[str, ModuleSpec], tensors: Container[str] = ()
) -> HeadPlan | None:
    """How the head computes that an adapter with this config and these tensors has; None for one without.

    PEFT has no task of images: an adapter trained on a classifier of images says none, and its head is in the file.
    """
    task = config.get("task_type")
    if task is None and isinstance(modules, ImageModules):
        plan = modules.heads.get("SEQ_CLS")
        return plan if plan is not None and f"{_PREFIX}{plan.stages[-1].path}.weight" in tensors else None
    return modules.heads.get(task) if isinstance(modules, HeadedModules) and isinstance(task, str) else None


def naming_of(modules: Mapping[str, ModuleSpec], tensors: Iterable[str]) -> Naming:
    """How an adapter with these tensors calls the modules."""
    if not isinstance(modules, EncoderModules):
        return Naming("")
    names = [name.removeprefix(_PREFIX) for name in tensors]
    before = f"{modules.prefix}."
    if not any(name.startswith(before) for name in names):
        before = ""
    return Naming(before, has_pooler=any(name.startswith(f"{before}{_POOLER}") for name in names))
