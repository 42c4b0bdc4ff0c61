"""When requests arrive. Open loop: times are drawn before the run and never wait for an answer.

`poisson`: gaps are exponential. `gamma`: gaps are Gamma(shape = burstiness, mean = 1/rate), so burstiness 1 is
Poisson, below 1 burstier, above 1 steadier; the gaps' coefficient of variation is 1/√burstiness. `constant`:
equal gaps. `closed`: `concurrency` clients, each sending its next request when its last one ended.
"""

import math
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

__all__ = ["Arrival", "ArrivalProcess"]

ArrivalProcess: TypeAlias = Literal["poisson", "gamma", "constant", "closed"]


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, int | float) and not isinstance(value, bool) else value


Rates: TypeAlias = Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_as_tuple)]
Levels: TypeAlias = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_as_tuple)]


class Arrival(BaseModel):
    """The arrival process and its stages: one per rate (open loop) or per level of concurrency (closed loop)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    process: ArrivalProcess = "poisson"
    rate: Rates = Field(default=(), description="requests per second; a list is a sweep, one stage each")
    concurrency: Levels = Field(default=(), description="`closed`: clients; a list is a sweep")
    burstiness: float = Field(default=1.0, gt=0, description="`gamma`: the shape")
    duration_s: float | None = Field(default=None, gt=0, description="of each stage")
    requests: int | None = Field(default=None, ge=1, description="in each stage; with a duration: at most")
    max_in_flight: int | None = Field(default=None, ge=1, description="open loop: what more arrives waits, timed")
    drain_between_stages: bool = Field(default=True, description="start a stage when the last one's answers are in")

    @model_validator(mode="after")
    def _is_consistent(self) -> "Arrival":
        if self.is_closed:
            if not self.concurrency or self.rate:
                raise ValueError("closed arrivals need `concurrency`, and no `rate`")
            if self.requests is None:
                raise ValueError("closed arrivals need `requests` (with `duration_s`, whichever ends first)")
            if self.max_in_flight is not None:
                raise ValueError("`max_in_flight` is for open arrivals; closed ones are bounded by `concurrency`")
        elif not self.rate or self.concurrency:
            raise ValueError(f"{self.process} arrivals need `rate`, and no `concurrency`")
        elif self.duration_s is None and self.requests is None:
            raise ValueError("give `duration_s`, `requests` or both")
        if self.process != "gamma" and "burstiness" in self.model_fields_set:
            raise ValueError(f"`burstiness` is for gamma arrivals, not {self.process}")
        return self

    @property
    def is_closed(self) -> bool:
        return self.process == "closed"

    @property
    def num_stages(self) -> int:
        return len(self.concurrency) if self.is_closed else len(self.rate)

    def times(self, stage: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """Arrival times in seconds from the stage's start, ascending. Closed loop: all 0 (sent as clients free up)."""
        if self.is_closed:
            assert self.requests is not None
            return np.zeros(self.requests)
        rate = self.rate[stage]
        count = self.requests if self.requests is not None else _enough(rate * (self.duration_s or 0))
        times = np.cumsum(self._gaps(count, rng)) / rate
        if self.duration_s is None:
            return times
        while self.requests is None and times[-1] < self.duration_s:
            times = np.concatenate([times, times[-1] + np.cumsum(self._gaps(count, rng)) / rate])
        return times[times < self.duration_s]

    def _gaps(self, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """`count` gaps with mean 1."""
        if self.process == "constant":
            return np.ones(count)
        if self.process == "gamma":
            return rng.gamma(self.burstiness, 1 / self.burstiness, size=count)
        return rng.exponential(1.0, size=count)


def _enough(expected: float) -> int:
    """A number of gaps that nearly always fills the stage at once."""
    return int(expected + 6 * math.sqrt(expected) + 16)
