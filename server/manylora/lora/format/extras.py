"""What an adapter may bring beside its method's own tensors: modules, biases and tokens that were trained whole.

Such a tensor has a module's own name, as the base's checkpoint has. It becomes a term that makes of the base's number
the adapter's: a matrix and a token's row by what they differ, a norm's weight by a factor.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Final

import numpy as np

from manylora.errors import InvalidAdapter, Problem
from manylora.identity import CONFIG_FILE, TENSOR_FILE
from manylora.lora.format.patterns import suffixes
from manylora.lora.format.problems import Problems, listed, shown
from manylora.lora.format.spec import (
    AdaptedModule,
    BaseLinear,
    BaseWeights,
    Dense,
    Floats,
    LowRank,
    Made,
    Matrix,
    ModuleSpec,
    Output,
    Term,
    TokenRows,
)
from manylora.lora.format.tensors import TensorView
from manylora.lora.format.vocabulary import (
    Resized,
    check_common_rows,
    has_tokens,
    is_of,
    num_tokens,
    resized_modules,
)

__all__ = ["Extras", "own_norm", "own_rows", "tokens_fault"]

Tensors = Mapping[str, TensorView]
Own = Mapping[str, tuple[Term, ...]]

_PREFIX: Final = "base_model.model."
_TOKENS: Final = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True, slots=True)
class Extras:
    """What a config says is saved beside the method's tensors, for one base. Adds its findings to `problems`."""

    config: Mapping[str, Any]
    modules: Mapping[str, ModuleSpec]
    problems: Problems
    warnings: list[str] = field(default_factory=list)
    weights: BaseWeights | None = None

    def split(self, tensors: Tensors) -> tuple[dict[str, TensorView], dict[str, tuple[Term, ...]]]:
        """The method's own tensors, and by module the terms that the others are."""
        saved, biases = self._saved_names(), self.config.get("bias") in ("all", "lora_only")
        resized = resized_modules(tensors, self.modules, self.problems)
        rest: dict[str, TensorView] = {}
        found: dict[str, dict[str, tuple[str, TensorView]]] = {}
        tokens: dict[str, tuple[str, TensorView]] = {}
        for name, view in sorted(tensors.items()):
            path, _, part = name.removeprefix(_PREFIX).rpartition(".")
            path = path.removesuffix(".modules_to_save")
            is_bias = biases and part == "bias" and path.removesuffix(".base_layer") in self.modules
            if name.endswith(_TOKENS):
                tokens[name.removeprefix(_PREFIX).removesuffix(_TOKENS)] = name, view
            elif any(is_of(name, each) for each in resized) or self._is_left(path, saved):
                continue
            elif is_bias or (part in ("weight", "bias") and self._is_saved(path, saved)):
                found.setdefault(path.removesuffix(".base_layer") if is_bias else path, {})[part] = name, view
            else:
                rest[name] = view
        own = {path: self._own(path, parts) for path, parts in found.items()}
        self._check_missing(saved, (*found, *resized))
        if self.config.get("trainable_token_indices") not in (None, [], {}) and not tokens:
            self.problems.add(
                "missing_tensor",
                f"{CONFIG_FILE}: trainable_token_indices",
                "The file has no rows of these tokens. Save the adapter again, or take the key out.",
            )
        trained: dict[str, tuple[list[int], TensorView]] = {}
        for path, (name, view) in tokens.items():
            for each in self._tied(path):  # a head that has the embedding's weight has the tokens' rows as well
                ids = self._trained(each, name, view, path, resized.get(each))
                if ids is not None:
                    trained[each] = ids, view
        for path in {**resized, **trained}:
            ids, rows = trained.get(path, ([], None))
            terms = self._token_terms(path, ids, rows, resized.get(path), is_saved=self._is_saved(path, saved))
            own[path] = (*own.get(path, ()), *terms)
        return rest, own

    @staticmethod
    def _is_left(path: str, saved: tuple[str, ...]) -> bool:
        """Whether a tensor is what a saved module was before it was trained."""
        owner = path.removesuffix(".original_module")
        return owner != path and Extras._is_saved(owner, saved)

    def _token_terms(
        self, path: str, ids: list[int], rows: TensorView | None, resized: Resized | None, *, is_saved: bool
    ) -> Iterator[Term]:
        """What trained tokens are, and those that the base has not; where all rows were trained, the others too."""
        spec = self.modules[path]
        if resized is None:
            assert rows is not None
            yield own_rows(spec, ids, rows)
            return
        most = num_tokens(spec)
        if is_saved:
            yield Dense(_common_difference(spec, resized))
        else:
            check_common_rows(path, resized, most, self.weights, self.problems, self.warnings)
        known = set(ids)
        added = [each for each in range(most, resized.num_tokens) if each not in known]
        if ids or added:
            yield own_rows(spec, [*ids, *added], _Rows(rows, resized, tuple(added)))

    def _tied(self, path: str) -> list[str]:
        """The module, and another one that has its weight."""
        spec = self.modules.get(path)
        if spec is None or not spec.is_tied:
            return [path]
        return [each for each, other in self.modules.items() if other.is_tied]

    def merged(self, made: Mapping[str, AdaptedModule], own: Own) -> tuple[AdaptedModule, ...]:
        """The modules with their own terms and these, in the base's order."""
        found = []
        for path, spec in self.modules.items():
            terms = made[path].terms if path in made else ()
            terms = combined((*terms, *own.get(path, ())))
            if any(isinstance(term, Dense) for term in terms) and any(_is_beside(spec, term) for term in terms):
                self.problems.add(
                    "unsupported_feature",
                    f"{CONFIG_FILE}: modules_to_save",
                    f"{shown(path)} is saved whole, and has a delta as well. Leave it out of target_modules.",
                )
            elif terms:
                found.append(AdaptedModule(path, spec.kind, terms))
        return tuple(found)

    def _saved_names(self) -> tuple[str, ...]:
        names = self.config.get("modules_to_save")
        if names in (None, []):
            return ()
        if isinstance(names, list) and all(isinstance(name, str) and name for name in names):
            tied = tuple(path for path, spec in self.modules.items() if spec.is_tied)
            ties = self.config.get("ensure_weight_tying") is True and any(self._is_saved(path, names) for path in tied)
            return (*names, *(tied if ties else ()))
        self.problems.add("bad_config", f"{CONFIG_FILE}: modules_to_save", "It must be a list of module names.")
        return ()

    @staticmethod
    def _is_saved(path: str, names: Iterable[str]) -> bool:
        """Whether a module is one that is saved, or inside one: PEFT's names are ends of paths, dot or no dot."""
        pieces = path.split(".")
        ends = tuple(names)
        return any(".".join(pieces[:end]).endswith(ends) for end in range(1, len(pieces) + 1))

    def _own(self, path: str, parts: Mapping[str, tuple[str, TensorView]]) -> tuple[Term, ...]:
        spec = self.modules.get(path)
        name, view = next(iter(parts.values()))
        if spec is None:
            self._add(
                "unsupported_feature",
                name,
                f"It is saved whole, and {shown(path)} is none of the linears, norms and embeddings that adapters may "
                "have of their own here. Take it out of modules_to_save, or merge the adapter into its base.",
            )
            return ()
        shapes = {"weight": _shape(spec), "bias": (spec.out_features,)}
        for part, (name, view) in parts.items():
            if view.shape != shapes[part]:
                self._add(
                    "base_mismatch",
                    name,
                    f"The adapter's own {shown(path)} has the shape {shown(list(view.shape))}, this base's is "
                    f"{shown(list(shapes[part]))}. Train it on this base. Where this base takes no tokens of an "
                    "adapter's own, train some that it does not use (trainable_token_indices), or merge it and "
                    "serve that checkpoint.",
                )
                return ()
        weight, bias = (parts[part][1] if part in parts else None for part in ("weight", "bias"))
        if spec.kind == "norm":
            return (own_norm(spec, weight, bias),)
        terms: tuple[Term, ...] = () if weight is None else (Dense(_difference(spec, weight)),)
        return terms if bias is None else (*terms, Output(shift=_shift(bias)))

    def _check_missing(self, saved: tuple[str, ...], found: Iterable[str]) -> None:
        """Each name has to have brought something."""
        paths = tuple(found)
        for name in saved:
            if not any(self._is_saved(path, (name,)) for path in paths):
                self.problems.add(
                    "missing_tensor",
                    f"{CONFIG_FILE}: modules_to_save",
                    f"The file has no weight of {shown(name)}. Save the adapter again, or take the name out.",
                )

    def _trained(self, path: str, name: str, view: TensorView, named: str, resized: Resized | None) -> list[int] | None:
        """The tokens whose rows a tensor has; None, with the reason in `problems`, where it has not."""
        spec, ids = self.modules.get(path), self._token_ids(named)
        if spec is None or ids is None or not has_tokens(spec) or view.shape != (len(ids), _hidden(spec)):
            self._add(
                "wrong_shape" if spec is not None and ids is not None else "unexpected_tensor",
                name,
                "It is not the rows of the tokens that the config's trainable_token_indices name.",
            )
            return None
        if problem := tokens_fault(num_tokens(spec) if resized is None else resized.num_tokens, ids):
            self.problems.add("base_mismatch", f"{CONFIG_FILE}: trainable_token_indices", problem)
            return None
        return ids

    def _token_ids(self, path: str) -> list[int] | None:
        """The ids whose rows are trained at one module: of a list the embedding's (and what is tied to it)."""
        named = self.config.get("trainable_token_indices")
        if isinstance(named, dict):
            named = next((ids for key, ids in named.items() if key in set(suffixes(path))), None)
        return named if isinstance(named, list) and all(type(each) is int for each in named) else None

    def _add(self, code: str, name: str, message: str) -> None:
        self.problems.add(code, f"{TENSOR_FILE}: {shown(name)}", message)


def tokens_fault(vocabulary: int, ids: list[int]) -> str | None:
    """What is wrong with the ids of trained tokens, of which there are so many."""
    beyond = [str(each) for each in ids if not 0 <= each < vocabulary]
    if beyond:
        return (
            f"The tokens {listed(beyond)} are beyond this base's {vocabulary}: it was trained with a larger vocabulary."
        )
    if len(set(ids)) < len(ids) or not ids:
        return "It must name at least one token, and none twice."
    return None


def own_rows(spec: ModuleSpec, ids: list[int], rows: Matrix) -> TokenRows:
    """Rows [n, hidden] in place of the base's for some tokens, of the embedding or of the head."""
    order = np.argsort(ids)
    ascending = tuple(ids[each] for each in order)

    def difference(base: BaseLinear) -> Floats:
        return rows.values(base)[order] - base.token_rows(ascending)

    return TokenRows(ascending, Made((len(ids), _hidden(spec)), difference))


def own_norm(spec: ModuleSpec, weight: Matrix | None, bias: Matrix | None) -> Output:
    """A norm's own weight and bias [width], said of the base's output: what its gain is multiplied by, and the rest."""
    shape = (spec.out_features,)

    def factor(base: BaseLinear) -> Floats:
        gain = base.weight()[:, 0]
        if weight is None:
            return np.ones_like(gain)
        wanted = weight.values(base) + np.float32(base.weight_offset)
        if bool(((gain == 0) & (wanted != 0)).any()):
            fault = "The base's norm has a weight of zero where the adapter's has not, which is not served."
            raise InvalidAdapter([Problem("unsupported_feature", f"{TENSOR_FILE}: {spec.path}", fault)])
        found: Floats = np.divide(wanted, gain, out=np.ones_like(gain), where=gain != 0)
        return found

    def rest(base: BaseLinear) -> Floats:
        before = np.zeros(shape, dtype=np.float32) if base.bias is None else base.bias
        after = before if bias is None else bias.values(base)
        return after - factor(base) * before

    has_bias = bias is not None
    return Output(Made(shape, factor), Made(shape, rest) if has_bias or weight is not None else None)


def combined(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """With one low-rank term in place of several, and one change of the output in place of several."""
    low = [term for term in terms if isinstance(term, LowRank)]
    outputs = [term for term in terms if isinstance(term, Output)]
    rest = tuple(term for term in terms if not isinstance(term, (LowRank, Output)))
    merged: tuple[Term, ...] = rest
    if low:
        merged = (low[0] if len(low) == 1 else _side_by_side(low), *merged)
    if outputs:
        merged = (*merged, outputs[0] if len(outputs) == 1 else _one_after_the_other(outputs))
    return merged


def _side_by_side(terms: list[LowRank]) -> LowRank:
    rank = sum(term.rank for term in terms)

    def b(base: BaseLinear) -> Floats:
        return np.concatenate([term.b.values(base) * np.float32(term.scale) for term in terms], axis=1)

    return LowRank(
        rank,
        1.0,
        Made((rank, terms[0].a.shape[1]), lambda base: np.concatenate([term.a.values(base) for term in terms])),
        Made((terms[0].b.shape[0], rank), b),
    )


def _one_after_the_other(terms: list[Output]) -> Output:
    scales = [term.scale for term in terms if term.scale is not None]
    width = terms[0].matrices[0].shape

    def scale(base: BaseLinear) -> Floats:
        found = np.ones(width, dtype=np.float32)
        for each in scales:
            found = found * each.values(base)
        return found

    def shift(base: BaseLinear) -> Floats:
        found = np.zeros(width, dtype=np.float32)
        for term in terms:
            found = found if term.scale is None else found * term.scale.values(base)
            found = found if term.shift is None else found + term.shift.values(base)
        return found

    return Output(Made(width, scale) if scales else None, Made(width, shift))


def _is_beside(spec: ModuleSpec, term: Term) -> bool:
    """Whether a term changes what a module that is saved whole has, too."""
    return isinstance(term, LowRank) or (isinstance(term, TokenRows) and term.ids[0] < num_tokens(spec))


def _shape(spec: ModuleSpec) -> tuple[int, ...]:
    """Of a module's weight in a checkpoint."""
    if spec.kind == "norm":
        return (spec.out_features,)
    outside, inside = spec.out_features, spec.in_features
    return (outside, inside) if spec.kind == "linear" else (inside, outside)


def _hidden(spec: ModuleSpec) -> int:
    return spec.out_features if spec.kind == "embedding" else spec.in_features


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of trained tokens, and behind them those of `added` tokens, which the base has not."""

    trained: TensorView | None
    resized: Resized
    added: tuple[int, ...]
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.added) + (0 if self.trained is None else self.trained.shape[0]), self.resized.weight.shape[1])

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * np.dtype(np.float32).itemsize

    def values(self, _base: object = None) -> Floats:
        """Float32 of both, whatever the base's are."""
        first = self.added[0] if self.added else 0
        new = self.resized.rows(first, self.resized.num_tokens).to_float32()[[each - first for each in self.added]]
        return new if self.trained is None else np.concatenate([self.trained.to_float32(), new])


def _common_difference(spec: ModuleSpec, resized: Resized) -> Made:
    """Of the rows that the base has as well; what the adapter has no row for is never asked for."""
    most = num_tokens(spec)

    def make(base: BaseLinear) -> Floats:
        values = resized.rows(0, min(most, resized.num_tokens)).to_float32()
        difference = np.zeros((most, values.shape[1]), dtype=np.float32)
        weight = base.weight()
        known = weight.T if spec.kind == "embedding" else weight
        difference[: len(values)] = values - known[: len(values)]
        return difference.T if spec.kind == "embedding" else difference

    return Made((spec.out_features, spec.in_features), make)


def _difference(spec: ModuleSpec, weight: TensorView) -> Made:
    def make(base: BaseLinear) -> Floats:
        values = weight.to_float32()
        return (values if spec.kind == "linear" else values.T) - base.weight()

    return Made((spec.out_features, spec.in_features), make)


def _shift(bias: TensorView) -> Made:
    def make(base: BaseLinear) -> Floats:
        return bias.to_float32() if base.bias is None else bias.to_float32() - base.bias

    return Made(bias.shape, make)
