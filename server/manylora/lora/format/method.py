"""Reads adapters of PEFT's methods beside LoRA: a method is a table of what it knows and a function that makes terms.

    config ──► settings, modules that it adapts ─┐
    tensors ──► parts of each module, shared ones ─┴─► method.terms(Site) ──► terms

Shapes and settings are checked when a term is described, numbers are made when it is packed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

import numpy as np

from manylora.identity import CONFIG_FILE, TENSOR_FILE
from manylora.lora.format import config, targets
from manylora.lora.format.config import LoraSettings
from manylora.lora.format.extras import Extras
from manylora.lora.format.pairing import PREFIX
from manylora.lora.format.problems import Problems, listed, shown
from manylora.lora.format.spec import AdaptedModule, Base, BaseWeights, Floats, ModuleSpec, Term
from manylora.lora.format.targets import Target, with_tied_heads
from manylora.lora.format.tensors import TensorView

__all__ = ["COMMON", "Method", "MethodReading", "Misfit", "Site"]

Tensors = Mapping[str, TensorView]

# Keys of every method's config that say which modules are adapted, or nothing.
COMMON: Final = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "inference_mode",
        "init_weights", "layers_pattern", "layers_to_transform", "modules_to_save", "peft_type", "peft_version",
        "revision", "target_modules", "task_type",
    }
)  # fmt: skip
_INTEGERS: Final[Mapping[str, str]] = {"I64": "<i8", "I32": "<i4", "U8": "u1", "I16": "<i2"}


class Misfit(Exception):
    """A tensor or a setting that a method cannot use: a problem's code, where, and what to do."""

    def __init__(self, code: str, where: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.where = where
        self.message = message


@dataclass(frozen=True, slots=True)
class Site:
    """One module that an adapter of a method adapts, with everything that the files say of it.

    `number` of `count`: its place among the adapted modules. `rank`, `alpha` are the config's for this module, of
    methods that have them; `parts` its own tensors, `shared` those of the whole adapter.
    """

    spec: ModuleSpec
    number: int
    count: int
    rank: int
    alpha: float
    config: Mapping[str, Any]
    parts: Tensors
    shared: Tensors

    @property
    def width(self) -> tuple[int, int]:
        """(in_features, out_features)."""
        return self.spec.in_features, self.spec.out_features

    def has(self, part: str) -> bool:
        return part in self.parts

    def part(self, name: str, *shape: int | None) -> TensorView:
        """A tensor of the module, of this shape; None for any size. Raises Misfit."""
        return self._checked(self.parts, name, shape)

    def common(self, name: str, *shape: int | None) -> TensorView:
        """A tensor of the whole adapter, likewise."""
        return self._checked(self.shared, name, shape)

    def indices(self, name: str, most: int, *shape: int | None) -> np.ndarray:
        """Whole numbers in [0, most), int64."""
        view = self._checked(self.parts, name, shape)
        if view.dtype not in _INTEGERS:
            raise Misfit("wrong_dtype", self.named(name), f"It is {view.dtype}; it holds whole numbers.")
        found = np.frombuffer(view.data, dtype=_INTEGERS[view.dtype]).astype(np.int64).reshape(view.shape)
        if found.size and not 0 <= int(found.min()) <= int(found.max()) < most:
            raise Misfit("wrong_shape", self.named(name), f"It names places beyond the {most} that there are.")
        return found

    def named(self, part: str) -> str:
        return f"{TENSOR_FILE}: {shown(f'{PREFIX}{self.spec.path}.{part}')}"

    def _checked(self, tensors: Tensors, name: str, shape: tuple[int | None, ...]) -> TensorView:
        view = tensors.get(name)
        if view is None:
            raise Misfit(
                "missing_tensor",
                self.named(name) if tensors is self.parts else f"{TENSOR_FILE}: {shown(name)}",
                "The config adapts this module, but the file has no such tensor. Save the adapter again.",
            )
        fits = len(view.shape) == len(shape) and all(
            wanted in (None, size) for wanted, size in zip(shape, view.shape, strict=True)
        )
        if not fits or not view.numel:
            expected = ["any" if size is None else size for size in shape]
            raise Misfit(
                "wrong_shape",
                self.named(name) if tensors is self.parts else f"{TENSOR_FILE}: {shown(name)}",
                f"Its shape is {shown(list(view.shape))}; this base's {self.spec.in_features} to "
                f"{self.spec.out_features} module and the config take {shown(expected)}.",
            )
        return view

    # settings

    def number_of(self, key: str, default: float) -> float:
        value = self._setting(key, default, lambda v: type(v) in (int, float) and abs(v) < 1e30, "a number")
        return float(value)

    def count_of(self, key: str, default: int | None, *, least: int = 1) -> int:
        """A whole number. Where `default` is None the config has to have it."""
        value = self._setting(key, default, lambda v: type(v) is int and least <= v < 2**63, "a whole number")
        return int(value)

    def flag(self, key: str, *, default: bool) -> bool:
        return bool(self._setting(key, default, lambda v: isinstance(v, bool), "true or false"))

    def choice(self, key: str, default: str, among: tuple[str, ...]) -> str:
        return str(self._setting(key, default, lambda v: v in among, f"one of {', '.join(among)}"))

    def _setting(self, key: str, default: Any, is_valid: Callable[[Any], bool], expected: str) -> Any:
        value = self.config.get(key)
        if value is None:
            value = default
        if value is None or not is_valid(value):
            raise Misfit("bad_config", f"{CONFIG_FILE}: {key}", f"It must be {expected}, not {shown(value)}.")
        return value

    def require(self, fits: bool, part: str, message: str) -> None:
        """Raises Misfit (`wrong_shape`) unless `fits`."""
        if not fits:
            raise Misfit("wrong_shape", self.named(part), message)


@dataclass(frozen=True, slots=True)
class Method:
    """One of PEFT's methods.

    `kind` is its name in the registry. `parts` are the ends of the names of a module's tensors, `shared` the beginnings
    of those of the whole adapter. `settings` are the config's keys that it reads, `training` those that change nothing
    that a trained adapter computes; `refused` has what is refused where it is switched on, with the reason.
    `left_aside` are ends of names that are copies of others. `rank_key`, `alpha_key`: what the config calls them.
    `on_norms`, `on_embeddings`: whether these are adapted; `on_tied_heads`: whether what it does to an embedding it
    does to the head as well, where that has the embedding's weight.
    """

    kind: str
    terms: Callable[[Site], tuple[Term, ...]]
    parts: tuple[str, ...]
    shared: tuple[str, ...] = ()
    settings: frozenset[str] = frozenset()
    training: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)
    left_aside: tuple[str, ...] = ()
    rank_key: str = "r"
    alpha_key: str = "alpha"
    on_norms: bool = False
    on_embeddings: bool = False
    on_tied_heads: bool = False

    @property
    def known(self) -> frozenset[str]:
        """Every key of a config that is read, or known to say nothing."""
        return COMMON | self.settings | self.training | self.refused.keys() | {self.rank_key, self.alpha_key}

    def reading(self, raw: dict[str, Any], problems: Problems, warnings: list[str]) -> "MethodReading | None":
        """Implements `kinds.ReadConfig`."""
        return MethodReading.of(self, raw, problems, warnings)


class MethodReading:
    """An adapter's config of one method, read. Implements `kinds.Reading`."""

    def __init__(self, method: Method, raw: dict[str, Any], settings: LoraSettings) -> None:
        self._method = method
        self._raw = raw
        self._settings = settings
        self.kind = method.kind
        self.alpha = float(settings.alpha)
        names = settings.target_modules
        self.target_modules = [names] if isinstance(names, str) else sorted(names)
        self.base_model_name_or_path = settings.base_model_name_or_path
        self.invocation: tuple[int, ...] = ()

    @classmethod
    def of(cls, method: Method, raw: dict[str, Any], problems: Problems, warnings: list[str]) -> Self | None:
        """From the config's JSON object; None, with the reasons in `problems`, where it is unusable."""
        config.check_keys(raw, method.known, problems, warnings)
        for key, reason in method.refused.items():
            if not config.is_off(raw.get(key)):
                problems.add("unsupported_feature", f"{CONFIG_FILE}: {key}", f"Not served: {reason}.")
        settings = config.settings_of(raw, problems, rank_key=method.rank_key, alpha_key=method.alpha_key)
        return None if settings is None else cls(method, raw, settings)

    def is_index(self, name: str) -> bool:
        """Whether a tensor holds whole numbers."""
        return any(piece in _INDEX_NAMES for piece in name.split("."))

    def modules(
        self, tensors: Tensors, base: Base, problems: Problems, warnings: list[str]
    ) -> tuple[AdaptedModule, ...]:
        """The adapted modules of an upload; every problem goes to `problems`."""
        candidates = self._candidates(base.modules)
        planned = targets.resolve(self._settings, candidates, config.MAX_NAMES, problems, warnings)
        if planned is None:
            return ()
        return self._made(tensors, base.modules, planned, problems, warnings, base.weights)

    def accepted(
        self, tensors: Tensors, modules: Mapping[str, ModuleSpec], problems: Problems, warnings: list[str]
    ) -> tuple[AdaptedModule, ...]:
        """The adapted modules of an adapter that was accepted before."""
        rest = Extras(self._raw, modules, problems).split(tensors)[0]
        candidates = self._candidates(modules)
        planned = targets.resolve_ranks(self._settings, candidates, self._grouped(rest, problems)[0], problems)
        if planned is None:
            return ()
        return self._made(tensors, modules, planned, problems, warnings)

    def _candidates(self, modules: Mapping[str, ModuleSpec]) -> dict[str, ModuleSpec]:
        method = self._method
        kinds = {"norm"} if method.on_norms else {"linear", "embedding", "conv1d"}
        return {path: spec for path, spec in modules.items() if spec.kind in kinds and not spec.is_parameter}

    def _made(
        self,
        tensors: Tensors,
        modules: Mapping[str, ModuleSpec],
        planned: Mapping[str, Target],
        problems: Problems,
        warnings: list[str],
        weights: BaseWeights | None = None,
    ) -> tuple[AdaptedModule, ...]:
        extras = Extras(self._raw, modules, problems, warnings, weights)
        rest, own = extras.split(tensors)
        grouped, shared = self._grouped(rest, problems)
        if self._method.on_tied_heads:
            planned = with_tied_heads(planned, modules)
        for path in sorted(grouped.keys() - planned.keys()):
            known = path in modules
            problems.add(
                "unexpected_tensor" if known else "unmatched_module",
                f"{TENSOR_FILE}: {shown(PREFIX + path)}",
                f"The config's target_modules do not include {shown(path)}."
                if known
                else f"The base has no adaptable module {shown(path)}.",
            )
        made: dict[str, AdaptedModule] = {}
        for number, (path, target) in enumerate(planned.items()):
            terms = self._terms(number, len(planned), target, grouped.get(path, {}), shared, problems)
            if terms:
                made[path] = AdaptedModule(path, target.spec.kind, terms)
        return extras.merged(made, own)

    def _terms(
        self, number: int, count: int, target: Target, parts: Tensors, shared: Tensors, problems: Problems
    ) -> tuple[Term, ...]:
        spec, method = target.spec, self._method
        if spec.kind == "conv1d" or (spec.kind == "embedding" and not method.on_embeddings):
            what = "GPT-2's Conv1D modules" if spec.kind == "conv1d" else "embeddings"
            problems.add(
                "unsupported_feature",
                f"{TENSOR_FILE}: {shown(spec.path)}",
                f"Not served: {what} with {method.kind}. Train a LoRA adapter for them.",
            )
            return ()
        try:
            return method.terms(Site(spec, number, count, target.rank, target.alpha, self._raw, parts, shared))
        except Misfit as misfit:
            problems.add(misfit.code, misfit.where, misfit.message)
            return ()

    def _grouped(self, tensors: Tensors, problems: Problems) -> tuple[dict[str, dict[str, TensorView]], Tensors]:
        """The tensors of each module, by part, and those of the whole adapter."""
        grouped: dict[str, dict[str, TensorView]] = {}
        shared: dict[str, TensorView] = {}
        unknown: list[str] = []
        for name, view in sorted(tensors.items()):
            plain = name.removeprefix(PREFIX)
            whole = name.removeprefix("base_model.")
            part = next((part for part in self._method.parts if plain.endswith(f".{part}")), None)
            if part is not None:
                grouped.setdefault(plain[: -len(part) - 1], {})[part] = view
            elif any(whole == each or whole.startswith(f"{each}.") for each in self._method.shared):
                shared[whole] = view
            elif not any(plain.endswith(f".{each}") for each in self._method.left_aside):
                unknown.append(name)
        if unknown and not problems.has("unsupported_feature"):
            problems.add(
                "unexpected_tensor",
                f"{TENSOR_FILE}: {shown(unknown[0])}",
                f"{len(unknown)} tensors are no part of a {self._method.kind} adapter: {listed(unknown, 3)}. Save the "
                "adapter alone, with PEFT's save_pretrained.",
            )
        return grouped, shared


_INDEX_NAMES: Final = frozenset(
    {
        "frod_s_indices", "frod_s_size", "shira_indices", "supertuning_indices", "unilora_indices_A",
        "unilora_indices_B", "vblora_logits_A_topk_indices", "vblora_logits_B_topk_indices",
    }
)  # fmt: skip


def product(left: Floats, right: Floats) -> Floats:
    """A matrix product that does not fall into another type."""
    found: Floats = (left @ right).astype(np.float32, copy=False)
    return found
