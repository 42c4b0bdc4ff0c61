"""How long prompts and answers are: the one definition for the load test, the benchmarks and the tests.

A plain integer in a scenario means that length always.
"""

from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

__all__ = ["Length", "LengthKind", "Lengths"]

LengthKind: TypeAlias = Literal["constant", "uniform", "normal", "lognormal", "exponential", "choice"]


class Length(BaseModel):
    """A distribution of a number of tokens. Every draw is rounded and kept within [low, high]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: LengthKind = "constant"
    value: int = Field(default=128, ge=1, description="`constant`")
    mean: float = Field(default=128, gt=0, description="`normal` and `exponential`, before keeping within bounds")
    std: float = Field(default=32, ge=0, description="`normal`")
    median: float = Field(default=128, gt=0, description="`lognormal`")
    sigma: float = Field(default=0.5, ge=0, description="`lognormal`: standard deviation of the logarithm")
    values: tuple[int, ...] = Field(default=(), description="`choice`: the lengths seen")
    weights: tuple[float, ...] = Field(default=(), description="`choice`: one per value; equal if left out")
    low: int = Field(default=1, ge=1)
    high: int = Field(default=1_000_000, ge=1)

    @model_validator(mode="after")
    def _is_consistent(self) -> "Length":
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high})")
        if self.kind == "uniform" and "high" not in self.model_fields_set:
            raise ValueError("a uniform length needs `high`")
        if self.kind == "choice" and not self.values:
            raise ValueError("a choice of lengths needs `values`")
        if self.weights and (len(self.weights) != len(self.values) or min(self.weights) < 0 or not sum(self.weights)):
            raise ValueError("`weights` needs one number >= 0 for each of `values`, not all 0")
        return self

    def draw(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Lengths of `count` requests, shape (count,)."""
        return np.asarray(np.clip(np.rint(self._raw(count, rng)), self.low, self.high), dtype=np.int64)

    def _raw(self, count: int, rng: np.random.Generator) -> NDArray[Any]:
        match self.kind:
            case "constant":
                return np.full(count, self.value)
            case "uniform":
                return rng.integers(self.low, self.high, size=count, endpoint=True)
            case "normal":
                return rng.normal(self.mean, self.std, size=count)
            case "lognormal":
                return rng.lognormal(np.log(self.median), self.sigma, size=count)
            case "exponential":
                return rng.exponential(self.mean, size=count)
            case "choice":
                total = sum(self.weights)
                shares = [weight / total for weight in self.weights] or None
                return rng.choice(np.asarray(self.values), size=count, p=shares)


def _from_integer(value: object) -> object:
    return {"kind": "constant", "value": value} if isinstance(value, int) and not isinstance(value, bool) else value


Lengths: TypeAlias = Annotated[Length, BeforeValidator(_from_integer)]
