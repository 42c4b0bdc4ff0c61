"""The kinds of adapters: for each `peft_type` what reads its config and turns its tensors into terms.

Whatever comes after the reader (layout, packing, device memory, kernels) knows terms and no kinds, so a kind that can
be said in the terms there are is one entry of `KINDS`. `docs/extending.md` shows one.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol, Self

from manylora.identity import CONFIG_FILE
from manylora.lora.format import config, targets
from manylora.lora.format.config import LoraSettings
from manylora.lora.format.encoders import tasks_of
from manylora.lora.format.experts import arranged
from manylora.lora.format.extras import Extras
from manylora.lora.format.method import Method
from manylora.lora.format.methods import dense, low_rank, prompts, rotations, vectors
from manylora.lora.format.pairing import Pairing, ranks_of, refuse_experts
from manylora.lora.format.problems import Problems, shown
from manylora.lora.format.spec import AdaptedModule, Base, BaseWeights, ModuleSpec
from manylora.lora.format.targets import Target
from manylora.lora.format.tensors import TensorView
from manylora.lora.format.vocabulary import own_num_tokens

__all__ = ["KINDS", "METHODS", "NOT_SERVED", "LoraReading", "Reading", "reading_of"]

Tensors = Mapping[str, TensorView]


class Reading(Protocol):
    """An adapter's config, read: it knows what the tensors beside it mean."""

    kind: str  # in the registry
    alpha: float
    target_modules: list[str]
    base_model_name_or_path: str | None
    invocation: tuple[int, ...]  # tokens from which on it acts; none: it acts everywhere

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

    def is_index(self, name: str) -> bool:
        """Whether a tensor holds whole numbers; all others are of a served float type."""
        ...


def without_norms(modules: Mapping[str, ModuleSpec]) -> dict[str, ModuleSpec]:
    """Modules that a delta can be added to."""
    return {path: spec for path, spec in modules.items() if spec.kind != "norm"}


class LoraReading:
    """LoRA: an A and a B for each module, and what else the config says there is."""

    kind = "lora"

    def __init__(self, settings: LoraSettings, raw: Mapping[str, Any]) -> None:
        self._settings = settings
        self._raw = raw
        names = settings.target_modules
        self.alpha = float(settings.alpha)
        self.target_modules = [names] if isinstance(names, str) else sorted(names)
        self.base_model_name_or_path = settings.base_model_name_or_path
        self.invocation = settings.invocation

    @classmethod
    def of(cls, raw: dict[str, Any], problems: Problems, warnings: list[str]) -> Self | None:
        """From the config's JSON object; None, with the reasons in `problems`, where it is unusable."""
        settings = config.parse(raw, problems, warnings)
        return None if settings is None else cls(settings, raw)

    def modules(
        self, tensors: Tensors, base: Base, problems: Problems, warnings: list[str]
    ) -> tuple[AdaptedModule, ...]:
        """The adapted modules of an upload; every problem goes to `problems`."""
        ready = arranged(self._settings, tensors, base.modules, problems)
        if refuse_experts(ready.tensors, base.modules, problems):
            return ()
        modules = without_norms(base.modules)
        planned = targets.resolve(self._settings, modules, base.max_rank, problems, warnings, ready.targets)
        self._check_invocation(planned or {}, ready.tensors, base.modules, problems)
        return self._paired(ready.tensors, base.modules, planned, problems, warnings, base.weights)

    def _check_invocation(
        self, planned: Mapping[str, Target], tensors: Tensors, modules: Mapping[str, ModuleSpec], problems: Problems
    ) -> None:
        """In the middle of a prompt linears are switched on, and in PEFT nothing else is."""
        others = [path for path, target in planned.items() if target.spec.kind == "embedding"]
        vocabulary = max((spec.in_features for spec in modules.values() if spec.kind == "embedding"), default=0)
        where = f"{CONFIG_FILE}: alora_invocation_tokens"
        if self.invocation and others:
            message = f"Not served: an embedding ({shown(others[0])}) that is invoked in the middle of a prompt."
            problems.add("unsupported_feature", where, f"{message} Train it on linears.")
        if self.invocation and "CAUSAL_LM" not in tasks_of(modules):
            message = "Not served: on an encoder, whose tokens before the invocation look at those behind it."
            problems.add("unsupported_feature", where, f"{message} Train it as plain LoRA.")
        if self.invocation and own_num_tokens(tensors, modules) is not None:
            message = "Not served: tokens of its own, which would act before it is invoked."
            problems.add("unsupported_feature", where, f"{message} Train it on the base as it is.")
        if vocabulary and any(each >= vocabulary for each in self.invocation):
            problems.add("base_mismatch", where, f"It names a token that this base's {vocabulary} tokens have not.")

    def accepted(
        self, tensors: Tensors, modules: Mapping[str, ModuleSpec], problems: Problems, warnings: list[str]
    ) -> tuple[AdaptedModule, ...]:
        """The adapted modules of an adapter that was accepted before."""
        ready = arranged(self._settings, tensors, modules, problems)
        ranks = ranks_of(ready.tensors, modules)
        planned = targets.as_accepted(self._settings, without_norms(modules), ranks, problems)
        return self._paired(
            ready.tensors, modules, None if planned is None else {**planned, **ready.targets}, problems, warnings
        )

    def is_index(self, name: str) -> bool:
        """No tensor of a LoRA adapter does."""
        return False

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
        name, settings = self.base_model_name_or_path, self._settings
        wanted = {"magnitude": settings.use_dora, "lora_bias": settings.lora_bias}
        more = frozenset(part for part, is_there in wanted.items() if is_there)
        extras = Extras(self._raw, modules, problems, warnings, weights)
        rest, own = extras.split(tensors)
        pairing = Pairing(planned, without_norms(modules), name, problems, warnings, weights, more, settings.initial)
        return extras.merged({module.path: module for module in pairing.run(rest)}, own)


ReadConfig = Callable[[dict[str, Any], Problems, list[str]], Reading | None]
METHODS: Final[Mapping[str, Method]] = {
    "ADALORA": low_rank.ADALORA,
    "BEFT": vectors.BEFT,
    "BOFT": rotations.BOFT,
    "C3A": dense.C3A,
    "DEFT": rotations.DEFT,
    "DELORA": low_rank.DELORA,
    "FOURIERFT": dense.FOURIERFT,
    "FROD": dense.FROD,
    "GLORA": dense.GLORA,
    "GRALORA": low_rank.GRALORA,
    "HIRA": dense.HIRA,
    "HRA": rotations.HRA,
    "IA3": vectors.IA3,
    "LN_TUNING": vectors.LN_TUNING,
    "LOHA": low_rank.LOHA,
    "LOKR": dense.LOKR,
    "MISS": low_rank.MISS,
    "OFT": rotations.OFT,
    "OSF": dense.OSF,
    "PEANUT": dense.PEANUT,
    "PVERA": low_rank.PVERA,
    "RANDLORA": low_rank.RANDLORA,
    "ROAD": rotations.ROAD,
    "SHIRA": dense.SHIRA,
    "SUPERTUNING": dense.SUPERTUNING,
    "TINYLORA": low_rank.TINYLORA,
    "TRAINABLE_TOKENS": vectors.TRAINABLE_TOKENS,
    "UNILORA": low_rank.UNILORA,
    "VBLORA": low_rank.VBLORA,
    "VERA": low_rank.VERA,
    "WAVEFT": dense.WAVEFT,
}
KINDS: Final[dict[str, ReadConfig]] = {"LORA": LoraReading.of} | {
    name: method.reading for name, method in METHODS.items()
}
KINDS.update(dict.fromkeys(prompts.PROMPTS, prompts.PromptReading.of))
# PEFT's other methods, and why none of their adapters is served.
NOT_SERVED: Final[Mapping[str, str]] = {
    "ADAMSS": "which outputs its subspaces are is not in the file; merge it with PEFT, or train a LoRA adapter",
    "ADAPTION_PROMPT": "it adds prompts inside the attention of some layers; train a LoRA adapter",
    "LILY": "it chooses its weights by the whole batch's hidden states; train a LoRA adapter",
    "MULTITASK_PROMPT_TUNING": "it brings virtual tokens for a task named with each request; train a LoRA adapter",
    "POLY": "it mixes skills for a task that is named with each request; train a LoRA adapter for each task",
    "PSOFT": "its meaning depends on the signs of a decomposition that are not in the file; merge it with PEFT",
    "SHADOW": "it is a model of its own beside the base; serve a merged checkpoint",
    "XLORA": "it routes between several adapters by hidden state; serve these adapters one by one",
}


def reading_of(raw: dict[str, Any], problems: Problems, warnings: list[str]) -> Reading | None:
    """The config read as its `peft_type` asks; None, with the reasons in `problems`, where that is not possible."""
    where, kind = f"{CONFIG_FILE}: peft_type", raw.get("peft_type")
    if isinstance(kind, str) and kind in KINDS:
        return KINDS[kind](raw, problems, warnings)
    if isinstance(kind, str) and kind:
        reason = NOT_SERVED.get(kind, "train a LoRA adapter")
        problems.add("unsupported_feature", where, f"Adapters of type {shown(kind)} are not served: {reason}.")
    else:
        problems.add(
            "bad_config",
            where,
            f'It must be one of PEFT\'s types, such as "LORA", not {shown(kind)}. Is this a PEFT config?',
        )
    return None
