"""An embedding and a head with rows for more tokens than the base has, or without those that it has for no token.

Whoever adds tokens resizes the model for them, and PEFT then saves both modules whole, trained or not. What is added
has rows of the adapter's own; what both have is the base's, or differs by a matrix where it was trained.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from manylora.identity import TENSOR_FILE
from manylora.lora.format.contents import num_different
from manylora.lora.format.problems import Problems, shown
from manylora.lora.format.spec import BaseWeights, ModuleSpec
from manylora.lora.format.tensors import TensorView

__all__ = [
    "MAX_OWN_TOKENS",
    "Resized",
    "check_common_rows",
    "has_tokens",
    "is_of",
    "num_tokens",
    "own_num_tokens",
    "resized_modules",
]

MAX_OWN_TOKENS: Final = 65_536
_UNUSED: Final = 16  # rows without a token are at most this part of the base's: they are there to make a round number
_PREFIX: Final = "base_model.model."
# Where PEFT keeps a module's weight, from what was trained to what was there before.
_PLACES: Final = (".weight", ".modules_to_save.weight", ".token_adapter.base_layer.weight", ".original_module.weight")


@dataclass(frozen=True, slots=True)
class Resized:
    """A module's weight with rows for another number of tokens, and the tensor's name."""

    name: str
    weight: TensorView

    @property
    def num_tokens(self) -> int:
        return self.weight.shape[0]

    def rows(self, begin: int, end: int) -> TensorView:
        return _rows_of(self.weight, begin, end)


def has_tokens(spec: ModuleSpec) -> bool:
    """Whether a module has a row for each token."""
    return spec.kind == "embedding" or spec.is_head


def num_tokens(spec: ModuleSpec) -> int:
    """Of an embedding or a head of the base."""
    return spec.in_features if spec.kind == "embedding" else spec.out_features


def _rows_of(view: TensorView, begin: int, end: int) -> TensorView:
    """Some rows of a matrix in a file."""
    width = len(view.data) // view.shape[0]
    return TensorView(view.dtype, (end - begin, *view.shape[1:]), view.data[begin * width : end * width])


def own_num_tokens(tensors: Mapping[str, TensorView], modules: Mapping[str, ModuleSpec]) -> int | None:
    """How many tokens an accepted adapter has rows for, where these are not as many as the base has."""
    return next((each.num_tokens for _, each in _found(tensors, modules)), None)


def resized_modules(
    tensors: Mapping[str, TensorView], modules: Mapping[str, ModuleSpec], problems: Problems
) -> dict[str, Resized]:
    """The modules with another number of tokens, by path: none, or the embedding and the head with the same number."""
    found = dict(_found(tensors, modules))
    if not found:
        return {}
    first = next(iter(found.values()))
    tied = [path for path, spec in modules.items() if spec.is_tied]
    for path in tied:  # a head that has the embedding's weight has its rows as well
        found.setdefault(path, first)
    wanted = {path for path, spec in modules.items() if has_tokens(spec)}
    if wanted != found.keys() or len({each.num_tokens for each in found.values()}) > 1:
        problems.add(
            "base_mismatch",
            f"{TENSOR_FILE}: {shown(first.name)}",
            f"It has rows for {first.num_tokens} tokens, and another module of the embedding and the head has not. "
            "Save the adapter with save_embedding_layers=True.",
        )
        return {}
    if first.num_tokens - num_tokens(modules[next(iter(found))]) > MAX_OWN_TOKENS:
        problems.add(
            "unsupported_feature",
            f"{TENSOR_FILE}: {shown(first.name)}",
            f"Not served: more than {MAX_OWN_TOKENS} tokens that the base has not.",
        )
        return {}
    return found


def _found(tensors: Mapping[str, TensorView], modules: Mapping[str, ModuleSpec]) -> Iterator[tuple[str, Resized]]:
    for path, spec in modules.items():
        if not spec.grows:
            continue
        hidden = spec.out_features if spec.kind == "embedding" else spec.in_features
        for place in _PLACES:
            name = next((each for each in (f"{_PREFIX}{path}{place}", f"{path}{place}") if each in tensors), None)
            if name is None:
                continue
            shape, most = tensors[name].shape, num_tokens(spec)
            if len(shape) == 2 and shape[1] == hidden and shape[0] != most and shape[0] >= most - most // _UNUSED:
                yield path, Resized(name, tensors[name])
            break


def is_of(name: str, path: str) -> bool:
    """Whether a tensor is a weight of the module, trained or not."""
    return any(name.removeprefix(_PREFIX) == f"{path}{place}" for place in _PLACES)


def check_common_rows(
    path: str, resized: Resized, most: int, weights: BaseWeights | None, problems: Problems, warnings: list[str]
) -> None:
    """The rows that the base has as well are to be the base's, of a module that was not trained whole."""
    base = None if weights is None else weights.find(path, "weight")
    count = min(most, resized.num_tokens)
    if base is None:
        warnings.append(
            f"{shown(resized.name)} has the base's rows beside those of its own tokens; they are left aside and were "
            "not compared with this base's."
        )
        return
    different = num_different(resized.rows(0, count), _rows_of(base, 0, count))
    if different:
        problems.add(
            "base_mismatch",
            f"{TENSOR_FILE}: {shown(resized.name)}",
            f"{different} numbers of the rows of the base's own tokens are not those of this base: they were trained "
            f"too, or belong to another base. If they were to be trained, name {shown(path)} in modules_to_save.",
        )
