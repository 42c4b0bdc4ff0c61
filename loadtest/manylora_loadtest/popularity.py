"""Which adapter each request names: the one definition for the load test, the benchmarks and the tests.

| kind | the i-th of `count` requests over adapters 0 … N-1 |
| --- | --- |
| `uniform` | every adapter equally likely |
| `zipf` | adapter k with weight 1 / (k + 1)^s |
| `one_hot` | adapter 0 with probability `hot_share`, else one of the others, uniformly |
| `skewed` | the first tenth of the adapters (at least one) gets nine tenths of the requests |
| `round_robin` | adapter i mod N, in order |
| `distinct` | as round robin, in a new random order on each pass: no repeat before all were named |
| `identical` | adapter 0, always |
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

__all__ = ["POPULARITY_KINDS", "Popularity", "PopularityKind"]

PopularityKind: TypeAlias = Literal["uniform", "zipf", "one_hot", "skewed", "round_robin", "distinct", "identical"]
POPULARITY_KINDS: Final[tuple[PopularityKind, ...]] = get_args(PopularityKind)


class Popularity(BaseModel):
    """A distribution over adapters by rank of popularity; adapter 0 is the most popular."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: PopularityKind = "uniform"
    s: float = Field(default=1.0, ge=0, description="exponent of `zipf`")
    hot_share: float = Field(default=0.9, ge=0, le=1, description="share of the first adapter in `one_hot`")

    def weights(self, num_adapters: int) -> NDArray[np.float64]:
        """The expected share of each adapter, shape (num_adapters,), sum 1."""
        if num_adapters < 1:
            raise ValueError("a popularity needs at least one adapter")
        make = _WEIGHTS.get(self.kind, _uniform)
        weights = make(self, num_adapters)
        return np.asarray(weights / weights.sum(), dtype=np.float64)

    def draw(self, num_adapters: int, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """The adapters of `count` requests in their order, shape (count,), values in [0, num_adapters)."""
        if self.kind == "round_robin":
            return np.arange(count, dtype=np.int64) % num_adapters
        if self.kind == "distinct":
            passes = [rng.permutation(num_adapters) for _ in range(-(-count // num_adapters))]
            return np.concatenate([*passes, np.empty(0, np.int64)]).astype(np.int64)[:count]
        return rng.choice(num_adapters, size=count, p=self.weights(num_adapters)).astype(np.int64)


def _uniform(_: Popularity, num_adapters: int) -> NDArray[np.float64]:
    return np.ones(num_adapters)


def _zipf(popularity: Popularity, num_adapters: int) -> NDArray[np.float64]:
    ranks = np.arange(1, num_adapters + 1, dtype=np.float64)
    return np.asarray(ranks**-popularity.s, dtype=np.float64)


def _hot_first(num_adapters: int, num_hot: int, hot_share: float) -> NDArray[np.float64]:
    if num_hot == num_adapters:
        return np.ones(num_adapters)
    weights = np.full(num_adapters, (1 - hot_share) / (num_adapters - num_hot))
    weights[:num_hot] = hot_share / num_hot
    return weights


def _one_hot(popularity: Popularity, num_adapters: int) -> NDArray[np.float64]:
    return _hot_first(num_adapters, 1, popularity.hot_share)


def _skewed(_: Popularity, num_adapters: int) -> NDArray[np.float64]:
    return _hot_first(num_adapters, max(1, num_adapters // 10), 0.9)


def _identical(_: Popularity, num_adapters: int) -> NDArray[np.float64]:
    return _hot_first(num_adapters, 1, 1.0)


_WEIGHTS: Final[Mapping[str, Callable[[Popularity, int], NDArray[np.float64]]]] = MappingProxyType(
    {"zipf": _zipf, "one_hot": _one_hot, "skewed": _skewed, "identical": _identical}
)
