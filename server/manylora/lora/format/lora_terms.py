"""What LoRA's tensors do to a module, said in terms: plain, DoRA, with a bias, or begun with a part of the base."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from manylora.lora.format.spec import BaseLinear, Floats, LowRank, Made, ModuleKind, ModuleSpec, Output, Reordered, Term
from manylora.lora.format.tensors import TensorView

__all__ = ["LoraParts", "lora_terms"]


@dataclass(frozen=True, slots=True)
class LoraParts:
    """A module's tensors, whatever their shapes are, with what the config says of them."""

    path: str
    kind: ModuleKind
    rank: int
    scale: float
    a: TensorView
    b: TensorView
    magnitude: TensorView | None = None
    lora_bias: TensorView | None = None


def lora_terms(spec: ModuleSpec, parts: LoraParts, initial: str | None) -> tuple[Term, ...]:
    """Of tensors whose shapes fit. `initial`: "pissa" or "olora" where A and B began as a part of the base's weight."""
    if spec.kind == "experts":
        return (_of_experts(spec, parts),)
    low = LowRank(parts.rank, parts.scale, parts.a, parts.b)
    if initial is not None and spec.kind != "embedding":
        low = _without_initial(spec, parts, initial)
    terms: list[Term] = [low]
    if parts.magnitude is not None:
        terms.append(_magnitude(spec, low, parts.magnitude))
    elif parts.lora_bias is not None:
        bias, scale = parts.lora_bias, np.float32(parts.scale)
        terms.append(Output(shift=Made((spec.out_features,), lambda _: bias.to_float32() * scale)))
    return tuple(terms)


def _of_experts(spec: ModuleSpec, parts: LoraParts) -> LowRank:
    """PEFT's B has each rank of all experts before the next rank; here each expert's ranks stand together, as A has."""
    rank, count = parts.rank * spec.num_experts, spec.num_experts

    def by_expert(b: Floats) -> Floats:
        return b.reshape(spec.out_features, parts.rank, count).transpose(0, 2, 1).reshape(b.shape)

    return LowRank(rank, parts.scale, parts.a, Reordered(parts.b, by_expert), num_experts=count)


def _magnitude(spec: ModuleSpec, low: LowRank, magnitude: TensorView) -> Output:
    """DoRA: each output's row of W + ΔW is given a length of its own, and the base's bias stays as it is."""

    def factor(base: BaseLinear) -> Floats:
        found: Floats = (magnitude.to_float32() / np.sqrt(_squared_lengths(base, low))).astype(np.float32)
        return found

    def shift(base: BaseLinear) -> Floats:
        if base.bias is None:
            return np.zeros(spec.out_features, dtype=np.float32)
        return base.bias * (np.float32(1) - factor(base))

    width = (spec.out_features,)
    return Output(Made(width, factor), Made(width, shift))


def _squared_lengths(base: BaseLinear, low: LowRank) -> Floats:
    """Of the rows of W + s B A, which is never made: |w|² + 2 s b (A w) + s² b (A Aᵀ) b."""
    a, b = low.a.values(base).astype(np.float64), low.b.values(base).astype(np.float64) * low.scale
    across = np.einsum("or,ro->o", b, base.project(a.astype(np.float32)).astype(np.float64))
    own = np.einsum("or,rs,os->o", b, a @ a.T, b, optimize=True)
    found: Floats = np.maximum(base.squared_norms() + 2 * across + own, 0)
    return found


class _Split(Protocol):
    def __call__(self, weight: Floats, rank: int, /) -> tuple[Floats, Floats]: ...


def _largest(weight: Floats, rank: int) -> tuple[Floats, Floats]:
    """PiSSA: [out, rank] and [rank, in] whose product has the largest singular values."""
    left, values, right = np.linalg.svd(weight, full_matrices=False)
    return left[:, :rank] * values[:rank], right[:rank]


def _first(weight: Floats, rank: int) -> tuple[Floats, Floats]:
    """OLoRA: the first columns of an orthonormal basis, times what the weight is in it."""
    q, r = np.linalg.qr(weight)
    return q[:, :rank], r[:rank]


def _without_initial(spec: ModuleSpec, parts: LoraParts, initial: str) -> LowRank:
    """A and B as they were trained less what they began with: of twice the rank, on the unchanged base."""
    split: _Split = _largest if initial == "pissa" else _first
    rank = parts.rank
    # What PiSSA begins with is divided by the scale, so that its delta is the base's part; OLoRA's is not.
    factor = np.float32(1 / parts.scale if initial == "pissa" and parts.scale else 1.0)

    @lru_cache(maxsize=1)
    def began(base: BaseLinear) -> tuple[Floats, Floats]:
        return split(base.weight(), rank)

    return LowRank(
        2 * rank,
        parts.scale,
        Made((2 * rank, spec.in_features), lambda base: np.concatenate((parts.a.to_float32(), began(base)[1]))),
        Made(
            (spec.out_features, 2 * rank),
            lambda base: np.concatenate((parts.b.to_float32(), -began(base)[0] * factor), axis=1),
        ),
    )
