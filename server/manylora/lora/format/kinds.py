"""The kinds of adapters: for each `peft_type` what reads its config and turns its tensors into terms.

Whatever comes after the reader (layout, packing, device memory, kernels) knows terms and no kinds, so a kind that can
be said in the terms there are is one entry of `KINDS`. `docs/extending.md` shows one.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol, Self

from manylora.identity import CONFIG_FILE
from manylora.lora.format import config, targets
from manylora.lora.format.config import LoraSettings
from manylora.lora.format.pairing import Pairing, ranks_of, refuse_experts
from manylora.lora.format.problems import Problems, shown
from manylora.lora.format.spec import AdaptedModule, Base, BaseWeights, ModuleSpec
from manylora.lora.format.targets import Target
from manylora.lora.format.tensors import TensorView

__all__ = ["KINDS", "LoraReading", "Reading", "reading_of"]

Tensors = Mapping[str, TensorView]


class Reading(Protocol):
    """An adapter's config, read: it knows what the tensors beside it mean."""

    kind: str  # in the registry
    alpha: float
    target_modules: list[str]
    base_model_name_or_path: str | None

    def modules(
        self, tensors: Tensors, base: Base, problems: Problems, warnings: list[str]
    ) -> tuple[AdaptedModule, ...]:
        """What the adapter does, held against the base completely; complete itself only if no problem was added."""
        ...

    def accepted(
        self, tensors: Tensors, modules: Mapping[str, ModuleSpec], problems: Problems, warnings: list[str]
    ) -> tuple[AdaptedModule, ...]:
        """What `modules` made of an adapter that was accepted before, again and fast, out of bounds in no case."""
        ...


class LoraReading:
    """Plain LoRA: an A and a B for each module."""

    kind = "lora"

    def __init__(self, settings: LoraSettings) -> None:
        self._settings = settings
        names = settings.target_modules
        self.alpha = float(settings.alpha)
        self.target_modules = [names] if isinstance(names, str) else sorted(names)
        self.base_model_name_or_path = settings.base_model_name_or_path

    @classmethod
    def of(cls, raw: dict[str, Any], problems: Problems, warnings: list[str]) -> Self | None:
        """From the config's JSON object; None, with the reasons in `problems`, where it is unusable."""
        settings = config.parse(raw, problems, warnings)
        return None if settings is None else cls(settings)

    def modules(
        self, tensors: Tensors, base: Base, problems: Problems, warnings: list[str]
    ) -> tuple[AdaptedModule, ...]:
        """The adapted modules of an upload; every problem goes to `problems`."""
        if refuse_experts(tensors, base.modules, problems):
            return ()
        planned = targets.resolve(self._settings, base.modules, base.max_rank, problems, warnings)
        return self._paired(tensors, base.modules, planned, problems, warnings, base.weights)

    def accepted(
        self, tensors: Tensors, modules: Mapping[str, ModuleSpec], problems: Problems, warnings: list[str]
    ) -> tuple[AdaptedModule, ...]:
        """The adapted modules of an adapter that was accepted before."""
        planned = targets.as_accepted(self._settings, modules, ranks_of(tensors), problems)
        return self._paired(tensors, modules, planned, problems, warnings)

    def _paired(
        self,
        tensors: Tensors,
        modules: Mapping[str, ModuleSpec],
        planned: Mapping[str, Target] | None,
        problems: Problems,
        warnings: list[str],
        weights: BaseWeights | None = None,
    ) -> tuple[AdaptedModule, ...]:
        if planned is None or not self._settings.has_plain_layout:
            return ()
        name = self.base_model_name_or_path
        return Pairing(planned, modules, name, problems, warnings, weights).run(tensors)


ReadConfig = Callable[[dict[str, Any], Problems, list[str]], Reading | None]
KINDS: Final[dict[str, ReadConfig]] = {"LORA": LoraReading.of}


def reading_of(raw: dict[str, Any], problems: Problems, warnings: list[str]) -> Reading | None:
    """The config read as its `peft_type` asks; None, with the reasons in `problems`, where that is not possible."""
    where, kind = f"{CONFIG_FILE}: peft_type", raw.get("peft_type")
    if isinstance(kind, str) and kind in KINDS:
        return KINDS[kind](raw, problems, warnings)
    if isinstance(kind, str) and kind:
        problems.add(
            "unsupported_feature", where, f"Adapters of type {shown(kind)} are not served; train a LoRA adapter."
        )
    else:
        problems.add("bad_config", where, f'It must be "LORA", not {shown(kind)}. Is this a PEFT adapter config?')
    return None
