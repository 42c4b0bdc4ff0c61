"""Several plain LoRA adapters become the files of one, as PEFT's `add_weighted_adapter` makes it of their A and B.

Ties (Yadav et al., 2023) keeps of each adapter the largest numbers, and of these the ones that have the sign of most;
DARE (Yu et al., 2023) drops numbers by chance and makes the others larger. Both work number by number, so unlike a sum
they have to be done beforehand.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from safetensors.numpy import save_file

from manylora.errors import InvalidRequest
from manylora.identity import CONFIG_FILE, TENSOR_FILE
from manylora.lora.format.problems import shown
from manylora.lora.format.spec import Adapter, Floats, LowRank
from manylora.lora.format.tensors import TensorView

__all__ = ["Method", "Recipe", "write_merged"]

Method = Literal["ties", "dare_linear", "dare_ties"]
_PREFIX: Final = "base_model.model."


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to merge. `density`: the share of each adapter's numbers that is kept; `seed` decides which DARE drops."""

    method: Method
    density: float
    seed: int = 0


@dataclass(frozen=True, slots=True)
class _Pair:
    """What one adapter has at a module, `weight` including its scale."""

    term: LowRank
    weight: float
    number: int  # of the adapter


def write_merged(parts: Sequence[tuple[Adapter, float, str]], recipe: Recipe, folder: Path, task: str | None) -> None:
    """Write config and tensors into `folder`, of adapters with their weights and labels. Raises InvalidRequest.

    `task`: what PEFT calls the task of a base of their kind, None where it has no fitting word.
    """
    kinds: dict[str, str] = {}
    pairs: dict[str, list[_Pair]] = {}
    for number, (adapter, weight, label) in enumerate(parts):
        if adapter.invocation or adapter.head is not None:
            raise _refused(f"{label} is more than a plain LoRA adapter")
        for module in adapter.modules:
            (term, *others) = module.terms
            if others or not isinstance(term, LowRank) or not _is_plain(term):
                raise _refused(f"{label} is at {shown(module.path)} more than an A and a B")
            kinds[module.path] = module.kind
            pairs.setdefault(module.path, []).append(_Pair(term, weight * term.scale, number))
    tensors: dict[str, Floats] = {}
    ranks: dict[str, int] = {}
    for place, (path, found) in enumerate(sorted(pairs.items())):
        if len({pair.term.rank for pair in found}) > 1:
            raise _refused(f"its adapters have different ranks at {shown(path)}")
        ranks[path] = found[0].term.rank
        a, b = _merged(found, recipe, np.random.default_rng([recipe.seed, place]))
        of_a, of_b = ("lora_embedding_A", "lora_embedding_B") if kinds[path] == "embedding" else ("lora_A", "lora_B")
        end = "" if kinds[path] == "embedding" else ".weight"
        tensors |= {f"{_PREFIX}{path}.{of_a}{end}": a, f"{_PREFIX}{path}.{of_b}{end}": b}
    save_file(tensors, folder / TENSOR_FILE, metadata={"format": "pt"})
    config = _config(ranks, task, parts[0][0].base_model_name_or_path)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2))


def _refused(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"'materialise' is for plain LoRA adapters of one rank, and {why}. Leave it out: a mix that is not "
        "materialised takes adapters of any kind and rank.",
        param="materialise",
    )


def _is_plain(term: LowRank) -> bool:
    return term.num_experts == 1 and isinstance(term.a, TensorView) and isinstance(term.b, TensorView)


def _merged(pairs: Sequence[_Pair], recipe: Recipe, random: np.random.Generator) -> tuple[Floats, Floats]:
    """A and B, each merged by itself with the root of the weights, whose sign goes with A."""
    roots = np.sqrt(np.abs([pair.weight for pair in pairs])).astype(np.float32)
    signs = np.where(np.array([pair.weight for pair in pairs]) >= 0, 1, -1).astype(np.float32)
    a = _combined([_values(pair.term.a) for pair in pairs], roots * signs, recipe, random)
    return a, _combined([_values(pair.term.b) for pair in pairs], roots, recipe, random)


def _values(matrix: object) -> Floats:
    assert isinstance(matrix, TensorView)
    return matrix.to_float32()


def _combined(tensors: Sequence[Floats], weights: Floats, recipe: Recipe, random: np.random.Generator) -> Floats:
    if recipe.density >= 1:
        kept = np.stack(tensors)
    elif recipe.method == "ties":
        kept = np.stack([_largest(each, recipe.density) for each in tensors])
    else:
        stacked = np.stack(tensors)
        kept = np.where(random.random(stacked.shape) < recipe.density, stacked / np.float32(recipe.density), 0)
    weighted = kept * weights[:, None, None]
    if recipe.method == "dare_linear":
        found = weighted.sum(axis=0)
    else:
        agrees = np.sign(kept) == np.where(kept.sum(axis=0) >= 0, 1, -1)
        found = (weighted * agrees).sum(axis=0) / np.maximum(agrees.sum(axis=0), 1)
    return np.ascontiguousarray(found, dtype=np.float32)


def _largest(values: Floats, density: float) -> Floats:
    """The share of the numbers that is largest in size; the others zero."""
    count = int(density * values.size)
    flat, found = values.ravel(), np.zeros_like(values)
    if count:
        places = np.argpartition(np.abs(flat), values.size - count)[values.size - count :]
        found.ravel()[places] = flat[places]
    return found


def _config(ranks: dict[str, int], task: str | None, base_name: str | None) -> dict[str, Any]:
    """All scales are 1: alpha is the rank everywhere."""
    most = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {path: rank for path, rank in ranks.items() if rank != most}
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base_name,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "inference_mode": True,
    }
