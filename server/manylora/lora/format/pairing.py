"""Holds the tensors of a file against the modules that its config adapts: exactly those, with fitting shapes."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from manylora.identity import CONFIG_FILE, TENSOR_FILE
from manylora.lora.format import contents
from manylora.lora.format.lora_terms import LoraParts, lora_terms
from manylora.lora.format.problems import Problems, listed, shown
from manylora.lora.format.spec import AdaptedModule, BaseWeights, ModuleSpec
from manylora.lora.format.targets import Target
from manylora.lora.format.tensors import TensorView

PREFIX = "base_model.model."
_COPIES = ("weight", "bias")
_EXPERT = re.compile(r"(?:^|\.)experts\.[0-9]+\.")
_EXPERTS = re.compile(r"(?:^|\.)experts(?:\.base_layer)*$")
_PARTS = {"lora_A": "a", "lora_B": "b", "lora_embedding_A": "a", "lora_embedding_B": "b"}
_MORE_PARTS = re.compile(
    r"(?P<path>.+)\.(?:(?P<magnitude>lora_magnitude_vector)(?:\.[^.]+)??(?:\.weight)?|lora_B(?:\.[^.]+)?\.bias)"
)


_ORDER: Final = ("a", "b", "magnitude", "lora_bias")


@dataclass
class _Found:
    """The tensors of one module, by part ("a", "b"), with their names in the file."""

    tensors: dict[str, TensorView] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _TensorName:
    path: str
    # "a", "b", "magnitude" (DoRA's), "lora_bias", or "weight" or "bias" for PEFT's copy of the base's, which comes with
    # an adapted embedding
    part: str
    is_embedding: bool | None  # None: may be either


def parse_name(name: str) -> _TensorName | None:
    """The module and part that a tensor's name means.

    `[base_model.model.]PATH.lora_A[.ADAPTER].weight`, and `PATH.lora_embedding_A[.ADAPTER]`, likewise B; or
    `PATH.base_layer.weight`, likewise bias; or `PATH.lora_magnitude_vector[.ADAPTER][.weight]` or
    `PATH.lora_B[.ADAPTER].bias`. None for any other name.
    """
    plain = name.removeprefix(PREFIX)
    if more := _MORE_PARTS.fullmatch(plain):
        return _TensorName(more["path"], "magnitude" if more["magnitude"] else "lora_bias", None)
    pieces = plain.split(".")
    if len(pieces) > 2 and pieces[-2] == "base_layer" and pieces[-1] in _COPIES:
        return _TensorName(".".join(pieces[:-2]), pieces[-1], is_embedding=False)
    is_linear = pieces[-1] == "weight"
    if is_linear:
        pieces.pop()
    for index in (-1, -2):
        if len(pieces) > -index and pieces[index] in _PARTS:
            is_embedding = pieces[index].startswith("lora_embedding")
            if is_embedding == is_linear:
                return None
            return _TensorName(".".join(pieces[:index]), _PARTS[pieces[index]], is_embedding)
    return None


def ranks_of(tensors: Mapping[str, TensorView], modules: Mapping[str, ModuleSpec]) -> dict[str, int]:
    """The modules that have an A, and its rank, of experts that of each."""
    named = ((parse_name(name), view) for name, view in tensors.items())
    found = {
        name.path: view.shape[0] for name, view in named if name and name.part == "a" and view.shape and view.shape[0]
    }
    return {path: rank // modules[path].num_experts if path in modules else rank for path, rank in found.items()}


def refuse_experts(tensors: Mapping[str, TensorView], modules: Mapping[str, ModuleSpec], problems: Problems) -> bool:
    """Whether experts are adapted, which are no modules here; one `unmatched_module` says what to do."""
    named = [parsed.path for name in tensors if (parsed := parse_name(name))]
    together = sorted({path for path in named if _EXPERTS.search(path)} - modules.keys())
    if together:
        problems.add(
            "unmatched_module",
            f"{TENSOR_FILE}: {shown(together[0])}",
            f"It adapts {len(together)} tensors of experts that this base has not, or to which no delta is added here, "
            "or that target_parameters does not name. Train it with target_modules on the attention alone, or merge it "
            "into its base and serve that checkpoint.",
        )
        return True
    paths = sorted({path for path in named if _EXPERT.search(path)} - modules.keys())
    if paths:
        problems.add(
            "unmatched_module",
            f"{TENSOR_FILE}: {shown(paths[0])}",
            f"It adapts {len(paths)} modules of single experts, as transformers 4 kept them; this base has none such. "
            "Merge it into its base with the transformers that it was trained with (PEFT's "
            "merge_and_unload) and serve that checkpoint, or train it on the attention alone.",
        )
    return bool(paths)


@dataclass
class Pairing:
    """One run of the comparison. Adds its findings to `problems` and `warnings`.

    `more`: which parts each module has beside A and B, "magnitude" and "lora_bias". `initial`: how A and B began, where
    that took something off the base.
    """

    targets: Mapping[str, Target]
    modules: Mapping[str, ModuleSpec]
    base_name: str | None
    problems: Problems
    warnings: list[str]
    base: BaseWeights | None = None
    more: frozenset[str] = frozenset()
    initial: str | None = None

    def run(self, tensors: Mapping[str, TensorView]) -> tuple[AdaptedModule, ...]:
        """The modules with their terms, in the base's order; complete only when no problem was added."""
        found = self._group(tensors)
        self._check_strangers(found)
        pairs = [
            _parts(target, found[path].tensors)
            for path, target in self.targets.items()
            if self._is_complete(path, found)
        ]
        self._check_missing_layers(found)
        self._check_shapes(pairs, found)
        return tuple(AdaptedModule(p.path, p.kind, lora_terms(self.modules[p.path], p, self.initial)) for p in pairs)

    def _add(self, code: str, name: str, message: str) -> None:
        self.problems.add(code, f"{TENSOR_FILE}: {shown(name)}", message)

    def _group(self, tensors: Mapping[str, TensorView]) -> dict[str, _Found]:
        found: dict[str, _Found] = defaultdict(_Found)
        for name in sorted(tensors):
            parsed = parse_name(name)
            if parsed is None:
                self._foreign(name)
            elif parsed.part in _COPIES:
                self._base_copy(name, parsed, tensors[name])
            elif (spec := self.modules.get(parsed.path)) and parsed.is_embedding is (spec.kind != "embedding"):
                wanted = "lora_embedding_A and lora_embedding_B" if spec.kind == "embedding" else "lora_A and lora_B"
                self._add("unexpected_tensor", name, f"{shown(parsed.path)} takes {wanted}.")
            elif parsed.part in _ORDER[2:] and parsed.part not in self.more:
                self._foreign(name)
            elif parsed.part in found[parsed.path].tensors:
                other = found[parsed.path].names[parsed.part]
                self._add("unexpected_tensor", name, f"It means the same as {shown(other)}; keep one of them.")
            else:
                found[parsed.path].tensors[parsed.part] = tensors[name]
                found[parsed.path].names[parsed.part] = name
        return found

    def _foreign(self, name: str) -> None:
        if name.rsplit(".", 1)[-1] == "lora_velora_embed" or ".lora_velora_embed." in name:
            self.warnings.append(f"{shown(name)} was used in training only (VeLoRA); it is left aside.")
        elif not self.problems.has("unsupported_feature"):  # else it belongs to what is refused already
            self._add(
                "unexpected_tensor",
                name,
                "It is no part of a plain LoRA adapter. Save the adapter alone, with PEFT's save_pretrained.",
            )

    def _base_copy(self, name: str, parsed: _TensorName, view: TensorView) -> None:
        """PEFT would put these numbers in the base's place; here they must be the base's own."""
        target = self.targets.get(parsed.path)
        if target is None or (parsed.part == "bias" and target.spec.kind == "embedding"):
            self._foreign(name)
            return
        spec, is_bias = target.spec, parsed.part == "bias"
        sizes = (spec.out_features, spec.in_features)
        shape = sizes[:1] if is_bias else sizes if spec.kind == "linear" else sizes[::-1]
        if view.shape != shape:
            self._add(
                "base_mismatch",
                name,
                f"The adapter was trained on a {shown(parsed.path)} of shape {shown(list(view.shape))}, this base has "
                f"{shown(list(shape))}. Train it on this base. Where it was resized for tokens of the adapter's own, "
                "name it in modules_to_save and not in target_modules, or these tokens in trainable_token_indices.",
            )
            return
        known = self.base is not None and self.base.find(parsed.path, "weight") is not None
        if self.base is None or not known:
            self.warnings.append(
                f"{shown(name)} is PEFT's copy of the base's {parsed.part}; it is left aside and was not compared with "
                "this base's. Save with save_embedding_layers=False for a smaller file."
            )
        elif different := contents.num_different(view, self.base.find(parsed.path, parsed.part)):
            self._add(
                "base_mismatch",
                name,
                f"{different} of its {view.numel} numbers are not those of this base's {parsed.part}: it was trained "
                "too, or belongs to another base. It would not be served; if the base's own is meant, save the adapter "
                "with save_embedding_layers=False.",
            )
        else:
            self.warnings.append(
                f"{shown(name)} is a copy of the base's {parsed.part}, and equal to it; PEFT saves one with an adapted "
                "embedding or head. It is left aside. Save with save_embedding_layers=False for a smaller file."
            )

    def _check_strangers(self, found: dict[str, _Found]) -> None:
        """Tensors for modules that the config does not adapt, or that the base does not have."""
        missing = sorted(found.keys() - self.modules.keys())
        for path in missing:
            self._add(
                "unmatched_module",
                next(iter(found[path].names.values())),
                f"The base has no adaptable module {shown(path)}.",
            )
        for path in sorted((found.keys() & self.modules.keys()) - self.targets.keys()):
            for name in found[path].names.values():
                self._add("unexpected_tensor", name, f"The config's target_modules do not include {shown(path)}.")
        if missing:
            self._explain_strangers(missing, found)

    def _explain_strangers(self, missing: list[str], found: dict[str, _Found]) -> None:
        trained_on = f" Its config names the base {shown(self.base_name)}." if self.base_name else ""
        if len(missing) == len(found):
            self._mismatch(
                f"None of the adapter's {len(found)} modules exists in this base: it was trained on another "
                f"architecture.{trained_on} Its modules are {listed(missing, 3)}."
            )
            return
        kinds = {_without_numbers(path) for path in self.modules}
        last = max((_layer_of(path) for path in self.modules), default=-1)
        beyond = [path for path in missing if _without_numbers(path) in kinds and _layer_of(path) > last >= 0]
        if len(beyond) == len(missing):
            highest = max(_layer_of(path) for path in beyond)
            self._mismatch(
                f"The adapter has layers up to {highest}, this base up to {last}: it was trained on a deeper "
                f"model.{trained_on}"
            )

    def _is_complete(self, path: str, found: dict[str, _Found]) -> bool:
        have = found[path].tensors.keys() if path in found else set()
        is_embedding = self.targets[path].spec.kind == "embedding"
        a, b = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
        wanted = {"a": a, "b": b, "magnitude": "lora_magnitude_vector", "lora_bias": "lora_B.bias"}
        wanted = {part: name for part, name in wanted.items() if part in "ab" or part in self.more}
        for part, suffix in wanted.items():
            if part not in have:
                self._add(
                    "missing_tensor",
                    f"{PREFIX}{path}.{suffix}",
                    "The config adapts this module, but the file has no such tensor. Save the adapter again, or name "
                    "the adapted layers with layers_to_transform.",
                )
        return have == wanted.keys()

    def _check_missing_layers(self, found: dict[str, _Found]) -> None:
        """Whole layers missing at the end: the adapter comes from a shallower base."""
        missing = {_layer_of(path) for path in self.targets if path not in found}
        present = {_layer_of(path) for path in self.targets if path in found}
        if missing and present and max(present) >= 0 and min(missing) > max(present):
            self._mismatch(
                f"The adapter ends at layer {max(present)}, this base at {max(missing)}: it may have been trained on "
                "a shallower model. If it is meant for some layers only, say so with layers_to_transform."
            )

    def _mismatch(self, message: str) -> None:
        self.problems.add("base_mismatch", f"{CONFIG_FILE}: base_model_name_or_path", message)

    def _check_shapes(self, pairs: Iterable[LoraParts], found: dict[str, _Found]) -> None:
        foreign: dict[str, list[LoraParts]] = defaultdict(list)
        fitting: set[str] = set()
        for pair in pairs:
            spec = self.modules[pair.path]
            wrong = [part for part, shape in _shapes(pair, spec).items() if getattr(pair, part).shape != shape]
            if not wrong:
                fitting.add(spec.leaf)
            elif spec.num_experts == 1 and _fits_another_base(pair):
                foreign[spec.leaf].append(pair)
            else:
                fitting.add(spec.leaf)
                self._wrong_shapes(pair, found[pair.path])
        is_consistent = sum(len(group) for group in foreign.values()) > 1 and all(
            leaf not in fitting and len({_widths(pair) for pair in group}) == 1 for leaf, group in foreign.items()
        )
        if is_consistent:
            self._explain_shapes(foreign)
            return
        for group in foreign.values():
            for pair in group:
                self._wrong_shapes(pair, found[pair.path])

    def _wrong_shapes(self, pair: LoraParts, found: _Found) -> None:
        spec = self.modules[pair.path]
        for part, shape in _shapes(pair, spec).items():
            view: TensorView = found.tensors[part]
            if view.shape != shape:
                self._add(
                    "wrong_shape",
                    found.names[part],
                    f"Its shape is {shown(list(view.shape))}; rank {pair.rank} on this base's {spec.in_features} to "
                    f"{spec.out_features} module takes {shown(list(shape))}.",
                )

    def _explain_shapes(self, foreign: dict[str, list[LoraParts]]) -> None:
        lines = []
        for leaf, group in sorted(foreign.items()):
            spec, (inside, outside) = self.modules[group[0].path], _widths(group[0])
            lines.append(f"{leaf} {inside} to {outside} (here {spec.in_features} to {spec.out_features})")
        named = f", its config says {shown(self.base_name)}" if self.base_name else ""
        self._mismatch(
            f"The adapter was trained on a base of another size{named}: {'; '.join(lines[:12])}. "
            "Serve it on that base, or train it on this one."
        )


def _parts(target: Target, tensors: Mapping[str, TensorView]) -> LoraParts:
    more = (tensors.get(part) for part in _ORDER[2:])
    return LoraParts(target.spec.path, target.spec.kind, target.rank, target.scale, tensors["a"], tensors["b"], *more)


def _shapes(pair: LoraParts, spec: ModuleSpec) -> dict[str, tuple[int, ...]]:
    """Of the parts that the module has."""
    rank = pair.rank * spec.num_experts
    shapes = {"a": (rank, spec.in_features), "b": (spec.out_features, rank)}
    more = {part: (spec.out_features,) for part in _ORDER[2:] if getattr(pair, part) is not None}
    return {**shapes, **more}


def _widths(pair: LoraParts) -> tuple[int, int]:
    return pair.a.shape[1], pair.b.shape[0]


def _fits_another_base(pair: LoraParts) -> bool:
    """A sound pair of the configured rank, whose widths only are not this base's."""
    is_pair = len(pair.a.shape) == len(pair.b.shape) == 2
    return is_pair and pair.a.shape[0] == pair.b.shape[1] == pair.rank and min(_widths(pair)) > 0


def _without_numbers(path: str) -> str:
    return ".".join("#" if part.isdigit() else part for part in path.split("."))


def _layer_of(path: str) -> int:
    """The first number in the path; -1 outside every layer."""
    return next((int(part) for part in path.split(".") if part.isdecimal() and len(part) < 7), -1)
